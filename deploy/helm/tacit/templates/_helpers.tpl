{{/* Names of objects are fixed: programs, certificates and documentation know them. */}}

{{/* Labels of an object of the program that is the second element: those that Kubernetes recommends. */}}
{{- define "tacit.labels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 | trimPrefix "tacit-" }}
app.kubernetes.io/part-of: tacit
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name ($root.Chart.Version | replace "+" "_") }}
{{- end }}

{{/* Those of a pod, with more that the values name: without any that another version of the chart
     changes, or its pods would be replaced. */}}
{{- define "tacit.podLabels" -}}
{{- $root := index . 0 -}}
{{- $own := dict "app.kubernetes.io/name" (index . 1) "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/component" (index . 1 | trimPrefix "tacit-") "app.kubernetes.io/part-of" "tacit" -}}
{{- merge $own (index . 2) | toYaml }}
{{- end }}

{{/* The image of the program that is the argument's second element. */}}
{{- define "tacit.image" -}}
{{- $root := index . 0 -}}
{{- $digest := get $root.Values.image.digests (index . 1 | trimPrefix "tacit-") -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end }}{{ index . 1 }}
{{- if $digest }}@{{ $digest }}{{ else }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}

{{/* What is known of a platform: folders of the node's container runtime, and its SELinux type. A value
     that is given counts more. */}}
{{- define "tacit.platform" -}}
{{- $known := dict
  "" (dict)
  "GKE" (dict "binDir" "/home/kubernetes/bin")
  "EKS" (dict)
  "AKS" (dict)
  "OpenShift" (dict "confDir" "/etc/kubernetes/cni/net.d" "binDir" "/var/lib/cni/bin" "netnsDir" "/var/run/netns" "seLinux" (dict "type" "spc_t"))
  "K3s" (dict "confDir" "/var/lib/rancher/k3s/agent/etc/cni/net.d" "binDir" "/var/lib/rancher/k3s/data/cni")
  "RKE2" (dict)
  "Talos" (dict)
  "MicroK8s" (dict "confDir" "/var/snap/microk8s/current/args/cni-network" "binDir" "/var/snap/microk8s/current/opt/cni/bin")
-}}
{{- $preset := get $known .Values.platform -}}
{{- $usual := dict "confDir" "/etc/cni/net.d" "binDir" "/opt/cni/bin" "netnsDir" "/run/netns" "seLinux" (dict) -}}
{{- $given := dict -}}
{{- with .Values.node.cni.confDir }}{{ $_ := set $given "confDir" . }}{{ end -}}
{{- with .Values.node.cni.binDir }}{{ $_ := set $given "binDir" . }}{{ end -}}
{{- with .Values.node.netnsDir }}{{ $_ := set $given "netnsDir" . }}{{ end -}}
{{- with .Values.node.agent.seLinuxOptions }}{{ $_ := set $given "seLinux" . }}{{ end -}}
{{- merge $given $preset $usual | toYaml }}
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
