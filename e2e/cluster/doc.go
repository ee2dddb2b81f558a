// Package cluster is a real Kubernetes on one machine: etcd, API server, controller
// manager, scheduler, and any number of nodes, each with a kubelet, containerd,
// runc and kube-proxy of its own, in namespaces and cgroups of its own.
//
//	owner (a test, or the keeper of make kube)
//	  │ clone, cgroups, cables, plan          netlink, a forwarded loopback port
//	  ├── machine "control-plane": bridge 172.30.0.1, etcd, kube-apiserver, …
//	  ├── machine "n1": 172.30.0.11, pods 10.244.1.0/24
//	  ├── machine "n2": 172.30.0.12, pods 10.244.2.0/24
//	  └── janitor: outlives the owner by a moment, removes cgroups and files
//
// The host's network namespace, mounts and kernel settings are not touched, so
// clusters stand beside each other on the same addresses. A machine is killed by
// the kernel when its owner dies; what a kill cannot end, directories, is left to
// the janitor, and should that be killed too, to whoever starts a cluster next.
//
// It refuses to be highly available, to pull images, and to reach the network
// outside of it.
package cluster
