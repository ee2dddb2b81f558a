package cli

import (
	"fmt"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"tacit.dev/control/kube"
)

const (
	// namespace is where Tacit is. The names of certificates depend on it, and
	// documentation and other programs know it.
	namespace = "tacit-system"
	// releaseName is what helm list shows.
	releaseName = "tacit"
	program     = "tacit"
	// nodesName and controlName are the DaemonSet and the Deployment.
	nodesName   = "tacit-node"
	controlName = "tacit-control"
)

// target are the flags that say which cluster is meant.
type target struct {
	config *genericclioptions.ConfigFlags
}

func newTarget(f *pflag.FlagSet) *target {
	config := genericclioptions.NewConfigFlags(true)
	*config.Namespace = namespace
	config.WrapConfigFn = func(c *rest.Config) *rest.Config {
		// The API server's own priority and fairness decides about us.
		c.QPS, c.Burst = 200, 400
		c.UserAgent = program
		c.WarningHandler = rest.NoWarnings{}
		return c
	}
	f.StringVar(config.KubeConfig, "kubeconfig", "", "`file` that names clusters (default $KUBECONFIG, then ~/.kube/config)")
	f.StringVar(config.Context, "context", "", "`name` of the context in it (default the current one)")
	return &target{config: config}
}

// cluster is a way to the API server, and to what Tacit has there.
type cluster struct {
	getter genericclioptions.RESTClientGetter
	client kubernetes.Interface
	meshes dynamic.ResourceInterface
	mapper meta.RESTMapper
}

func (t *target) connect() (*cluster, error) {
	cfg, err := t.config.ToRESTConfig()
	if err != nil {
		return nil, fmt.Errorf("find the cluster: %w: give --kubeconfig, or set KUBECONFIG", err)
	}
	c := &cluster{getter: t.config}
	if c.client, err = kubernetes.NewForConfig(cfg); err != nil {
		return nil, fmt.Errorf("talk to %s: %w", cfg.Host, err)
	}
	objects, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("talk to %s: %w", cfg.Host, err)
	}
	c.meshes = objects.Resource(kube.MeshResource())
	if c.mapper, err = t.config.ToRESTMapper(); err != nil {
		return nil, fmt.Errorf("ask %s for its kinds: %w", cfg.Host, err)
	}
	return c, nil
}
