package kube

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// TestProbePorts: of all containers, by number and by name; what the kubelet calls
// elsewhere, or not over the network, is none.
func TestProbePorts(t *testing.T) {
	const text = `
spec:
  initContainers:
  - name: sidecar
    restartPolicy: Always
    startupProbe: {tcpSocket: {port: 7000}}
  containers:
  - name: a
    ports: [{name: web, containerPort: 8080}]
    startupProbe: {httpGet: {port: web}}
    readinessProbe: {httpGet: {port: 8080}}
    livenessProbe: {grpc: {port: 9090}}
    lifecycle:
      postStart: {httpGet: {port: 8081}}
      preStop: {exec: {command: [stop]}}
  - name: b
    startupProbe: {exec: {command: [look]}}
    readinessProbe: {httpGet: {port: web}}
    livenessProbe: {httpGet: {host: elsewhere, port: 443}}
`
	var p corev1.Pod
	if err := yaml.UnmarshalStrict([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]uint16{7000, 8080, 8081, 9090}, probePorts(whole(&p))); d != "" {
		t.Errorf("ports (-want +got):\n%s", d)
	}
	if got := probePorts(&PodObject{}); len(got) != 0 {
		t.Errorf("a pod without probes has %v", got)
	}
}
