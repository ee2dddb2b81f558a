{{/* Names of objects are fixed: programs, certificates and documentation know them. */}}

{{- define "tacit.labels" -}}
app.kubernetes.io/part-of: tacit
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end }}

{{/* Those of a pod: without any that another version of the chart changes, or its pods would be replaced. */}}
{{- define "tacit.podLabels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: tacit
{{- end }}

{{/* The image of the program that is the argument's second element. */}}
{{- define "tacit.image" -}}
{{- $root := index . 0 -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end }}{{ index . 1 }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end }}

{{- define "tacit.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "tacit.controlName" -}}
tacit-control.{{ .Release.Namespace }}.svc
{{- end }}

{{/* The token by which a process, the proxy or the agent, proves itself and its node: what one of them may
     tell control, the other may not. */}}
{{- define "tacit.token" -}}
name: {{ . }}-token
projected:
  sources:
    - serviceAccountToken:
        audience: tacit-{{ . }}
        expirationSeconds: 3600
        path: token
{{- end }}

{{/* DNS, whoever serves it. */}}
{{- define "tacit.dnsPorts" }}
        {{- range .Values.networkPolicy.dnsPorts }}
        - {port: {{ . }}, protocol: UDP}
        - {port: {{ . }}, protocol: TCP}
        {{- end }}
{{- end }}

{{/* Who may scrape, as a rule of ingress. Without a peer there is no rule: one without `from` would let everybody in. */}}
{{- define "tacit.metricsFrom" }}
    {{- with .Values.networkPolicy.metricsFrom }}
    - ports:
        - {port: 15025, protocol: TCP}
      from: {{- toYaml . | nindent 8 }}
    {{- end }}
{{- end }}
