package kube

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Client talks to an API server.
type Client struct {
	kubernetes.Interface
	// Reviews is for what strangers can cause. It has a rate of its own, so that
	// they hold up nothing else: the leader's lease above all.
	Reviews kubernetes.Interface
	// Shows is for conditions of pods. A Display has a rate of its own, so that they hold up
	// nothing else, either. nil is the first.
	Shows kubernetes.Interface
	// Meshes are those of our own kind.
	Meshes dynamic.ResourceInterface
	// Policies are the AuthorizationPolicies, as of PolicyResources.
	Policies []dynamic.NamespaceableResourceInterface
	// Peers are the PeerAuthentications, as of PeerResources.
	Peers []dynamic.NamespaceableResourceInterface
}

// NewClient talks to the API server that a kubeconfig names, or, if path is "", to
// that of the cluster this process runs in.
func NewClient(path string) (Client, error) {
	find := rest.InClusterConfig
	if path != "" {
		find = func() (*rest.Config, error) { return clientcmd.BuildConfigFromFlags("", path) }
	}
	cfg, err := find()
	if err != nil {
		return Client{}, fmt.Errorf("find the API server: %w: give a kubeconfig, or run in a pod with a service account's token", err)
	}
	// The API server's own priority and fairness decides about us; a limit on
	// this side only makes a burst of status slow.
	cfg.QPS, cfg.Burst = 200, 400
	cfg.UserAgent = "tacit-control"
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return Client{}, fmt.Errorf("talk to the API server: %w", err)
	}
	d, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return Client{}, fmt.Errorf("talk to the API server: %w", err)
	}
	cfg.QPS, cfg.Burst = reviewRate, 2*reviewRate
	reviews, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return Client{}, fmt.Errorf("talk to the API server: %w", err)
	}
	cfg.QPS = -1 // a Display's is the limit
	shows, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return Client{}, fmt.Errorf("talk to the API server: %w", err)
	}
	return Client{c, reviews, shows, d.Resource(MeshResource()), Policies(d), Peers(d)}, nil
}

// Policies are the AuthorizationPolicies of a cluster, as of PolicyResources.
func Policies(d dynamic.Interface) []dynamic.NamespaceableResourceInterface {
	return resources(d, PolicyResources())
}

// Peers are the PeerAuthentications of a cluster, as of PeerResources.
func Peers(d dynamic.Interface) []dynamic.NamespaceableResourceInterface {
	return resources(d, PeerResources())
}

func resources(d dynamic.Interface, all []schema.GroupVersionResource) (list []dynamic.NamespaceableResourceInterface) {
	for _, at := range all {
		list = append(list, d.Resource(at))
	}
	return list
}
