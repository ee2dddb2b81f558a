package cluster

// nodeTemplates are the configuration files of a node; settings fills them.
func nodeTemplates() map[string]string {
	return map[string]string{
		"etc/cni/net.d/10-ptp.conflist":  cniConfig,
		"etc/containerd/config.toml":     containerdConfig,
		"etc/kubernetes/kubelet.yaml":    kubeletConfig,
		"etc/kubernetes/kube-proxy.yaml": kubeProxyConfig,
	}
}

// Each pod has a veth of its own and a route in its node: no bridge inside of a
// node, so every packet between pods passes the node's rules.
const cniConfig = `{
  "cniVersion": "1.0.0", "name": "pods",
  "plugins": [
    {"type": "ptp", "mtu": 1500, "ipam": {"type": "host-local",
      "ranges": [{{range $i, $r := .Ranges}}{{if $i}}, {{end}}[{"subnet": "{{$r}}"}]{{end}}],
      "routes": [{{range $i, $r := .DefaultRoutes}}{{if $i}}, {{end}}{"dst": "{{$r}}"}{{end}}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}, "backend": "nftables"}
  ]
}
`

// restrict_oom_score_adj: a node in a container may not lower it.
const containerdConfig = `version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "` + PauseImage + `"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "` + nodePrograms + `/runc"
      SystemdCgroup = false
`

// failCgroupV1: machines with v1 are still about. evictionHard: the disk is the
// host's, and how full it is not our matter. KubeletInUserNamespace lets it go on
// where the kernel's settings are read-only.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
featureGates: {KubeletInUserNamespace: true}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: [` + dnsService4 + `]
clusterDomain: cluster.local
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: /etc/kubernetes/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: /etc/kubernetes/kubelet.crt
tlsPrivateKeyFile: /etc/kubernetes/kubelet.key
evictionHard: {imagefs.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", memory.available: "0%"}
imageGCHighThresholdPercent: 100
makeIPTablesUtilChains: false
nodeStatusUpdateFrequency: 2s
registerNode: true
maxOpenFiles: {{.FileLimit}}
volumePluginDir: /var/lib/kubelet/volumeplugins
`

// conntrack: its limits are the host's. minSyncPeriod: tests wait for endpoints.
const kubeProxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: {{.PodCIDRs}}
hostnameOverride: {{.Name}}
clientConnection: {kubeconfig: /etc/kubernetes/kube-proxy.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
nftables: {minSyncPeriod: 100ms}
`
