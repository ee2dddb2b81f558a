// Package lab is a cluster in a bottle: nodes and pods are network namespaces of
// one machine, joined by veths and a bridge, and every process of Tacit in it is
// real. The source of tacit-control is a folder of ordinary Kubernetes YAML, in
// which the lab itself keeps Pods, ClusterIPs and EndpointSlices, as kubelets and
// controllers would; services are led to endpoints by nft rules in the node, as
// kube-proxy would.
//
//	namespace "underlay": bridge, tacit-control, the lab itself
//	   │ veth          │ veth
//	node n1           node n2          tacit-node agent, tacit-node proxy, nft rules of services
//	   │ veth per pod  │
//	pod a             pod b            the application, /etc/hosts of its own
//
// It works as root and as an ordinary user (in a user namespace), touches nothing
// of the host's namespaces, and leaves nothing behind: all of it lives in a pid
// and a mount namespace that end with its first process, also by SIGKILL.
//
// A lab is told what to do by verbs (node, pod, apply, exec, …): lines of words
// over a unix socket, the same for a person (tacit lab) and for a story
// (testdata/*.txtar). It refuses to be a Kubernetes: no API server, no scheduler,
// no images.
package lab
