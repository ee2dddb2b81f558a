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
	f.StringVar(config.Impersonate, "as", "", "`user` to act as, if you may impersonate")
	f.StringArrayVar(config.ImpersonateGroup, "as-group", nil, "`group` to act as, with --as; may be repeated")
	f.StringVar(config.Timeout, "request-timeout", "0", "`time` that one request to the API server may take, as 5s; 0 is no limit")
	return &target{config: config}
}

// cluster is a way to the API server, and to what Tacit has there.
type cluster struct {
	// name says for people which cluster it is.
	name    string
	getter  genericclioptions.RESTClientGetter
	client  kubernetes.Interface
	dynamic dynamic.Interface
	meshes  dynamic.ResourceInterface
	mapper  meta.RESTMapper
	// records, if not nil, is Helm's instead of what getter leads to.
	records *releases
}

func (t *target) connect() (*cluster, error) {
	cfg, err := t.config.ToRESTConfig()
	if err != nil {
		return nil, fmt.Errorf("find the cluster: %w: give --kubeconfig, or set KUBECONFIG", err)
	}
	c := &cluster{getter: t.config, name: t.name(cfg.Host)}
	if c.client, err = kubernetes.NewForConfig(cfg); err != nil {
		return nil, fmt.Errorf("talk to %s: %w", cfg.Host, err)
	}
	if c.dynamic, err = dynamic.NewForConfig(cfg); err != nil {
		return nil, fmt.Errorf("talk to %s: %w", cfg.Host, err)
	}
	c.meshes = c.dynamic.Resource(kube.MeshResource())
	if c.mapper, err = t.config.ToRESTMapper(); err != nil {
		return nil, fmt.Errorf("ask %s for its kinds: %w", cfg.Host, err)
	}
	return c, nil
}

// name is that of the context, and where its cluster is.
func (t *target) name(host string) string {
	context := *t.config.Context
	if raw, err := t.config.ToRawKubeConfigLoader().RawConfig(); err == nil && context == "" {
		context = raw.CurrentContext
	}
	if context == "" {
		return "the cluster at " + host
	}
	return fmt.Sprintf("the cluster of context %s (%s)", context, host)
}
