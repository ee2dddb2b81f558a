package main

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"tacit.dev/admin"
	"tacit.dev/control"
	"tacit.dev/control/ca"
	"tacit.dev/control/kube"
	"tacit.dev/mesh"
)

// parse turns flags into a Config, and the log that it has.
func parse(args []string) (cfg control.Config, log *admin.Log, err error) {
	cfg.Registry = admin.NewRegistry(version)
	var from origin
	told := admin.LogConfig{Registry: cfg.Registry}
	f := flag.NewFlagSet("tacit-control", flag.ContinueOnError)
	f.StringVar(&from.source, "source", "", "where the objects are: kubernetes, or a `folder` of Kubernetes YAML")
	f.StringVar(&from.kubeconfig, "kubeconfig", "", "`file` that names the API server (default: that of the cluster this runs in)")
	f.StringVar(&from.state, "state", "", "with a source folder: `folder` of the CA, of what is announced, and of bundle.pem for the nodes")
	f.StringVar(&cfg.Listen, "listen", "127.0.0.1:15010", "`HOST:PORT` where nodes connect")
	f.StringVar(&cfg.Advertise, "advertise", "", "with kubernetes: `HOST:PORT` where other replicas reach --listen (default: an address of this machine)")
	f.StringVar(&cfg.Admin, "admin", "127.0.0.1:15022", "`HOST:PORT` of readiness, metrics and dumps")
	f.BoolVar(&cfg.Profiles, "profiles", false, "serve profiles of this process at --admin, too")
	f.StringVar(&cfg.Metrics, "metrics", "", "`HOST:PORT` of readiness and metrics alone, for what comes over a network; \"\" is none")
	f.Func("name", "DNS `name` or IP address by which nodes reach control, besides that of --listen; may be repeated", func(s string) error {
		cfg.Names = append(cfg.Names, strings.Split(s, ",")...)
		return nil
	})
	f.StringVar(&cfg.TrustDomain, "trust-domain", "cluster.local", "trust `domain` of all identities")
	f.StringVar(&cfg.Cluster, "cluster", "", "`name` of the cluster (default Kubernetes)")
	f.Func("cluster-cidr", "`range` of addresses of pods or services that no Node and no ServiceCIDR names: an address in it that nobody is known at is refused; may be repeated", func(s string) error {
		r, err := netip.ParsePrefix(s)
		if err == nil {
			cfg.Ranges, err = append(cfg.Ranges, r.Masked()), kube.CheckRange(r)
		}
		return err
	})
	nodePorts := f.String("node-ports", "30000-32767", "`range` out of which Services get ports of nodes, as --service-node-port-range of the API server has it: a port in it of a node, which no Service and no pod is known to have, is refused; \"\" is none")
	f.DurationVar(&cfg.LeafTTL, "leaf-ttl", ca.DefaultLeafTTL, "how long a certificate of a pod lives")
	f.StringVar(&from.tokens, "tokens", "", "with a source folder: `folder` that has folders proxies and agents, each with one file per node, named after it, that holds the token of that process")
	f.StringVar(&from.proxyAudience, "proxy-audience", "tacit-proxy", "with kubernetes: `audience` of the tokens of proxies")
	f.StringVar(&from.agentAudience, "agent-audience", "tacit-agent", "with kubernetes: `audience` of the tokens of agents")
	f.StringVar(&from.namespace, "namespace", "tacit-system", "with kubernetes: `namespace` of what control keeps")
	f.StringVar(&cfg.RootNamespace, "root-namespace", "", "`namespace` whose AuthorizationPolicies and PeerAuthentications apply to the whole mesh (default that of --namespace with kubernetes, none with a folder)")
	f.StringVar(&from.account, "node-account", "tacit-system/tacit-node", "with kubernetes: service account of the nodes' processes, as `NAMESPACE/NAME`")
	f.IntVar(&from.statusWrites, "status-writes", kube.DefaultStatusWrites, "with kubernetes: write at most `N` conditions of pods, and of policies, per second to the API server")
	f.DurationVar(&cfg.GoneAfter, "gone-after", 30*time.Second, "how long a withdrawal waits for a node that is not connected")
	f.StringVar(&told.Format, "log-format", "json", "text or json")
	f.StringVar(&told.Level, "log-level", "info", "debug, info, warn or error")
	print := f.Bool("version", false, "print the version and end")
	if err := f.Parse(args); err != nil {
		return cfg, nil, err
	}
	if *print {
		fmt.Println(version)
		return cfg, nil, flag.ErrHelp
	}
	if f.NArg() > 0 {
		return cfg, nil, fmt.Errorf("%q: want flags and no arguments", f.Args())
	}
	if cfg.NodePorts, err = mesh.ParseNodePorts(*nodePorts); err != nil {
		return cfg, nil, fmt.Errorf("--node-ports: %w", err)
	}
	if log, err = admin.NewLog(told); err != nil {
		return cfg, nil, err
	}
	cfg.Log = log.Logger
	return cfg, log, from.open(&cfg)
}

// maxStatusWrites is more than an API server takes from one client.
const maxStatusWrites = 10_000

// origin is what the flags say of where objects and nodes come from.
type origin struct {
	source, state, kubeconfig, tokens, proxyAudience, agentAudience, account, namespace string
	statusWrites                                                                        int
}

// open gives cfg its source and its nodes.
func (o origin) open(cfg *control.Config) (err error) {
	switch o.source {
	case "":
		return errors.New("want --source: kubernetes, or a folder of Kubernetes YAML")
	case "kubernetes":
		return o.openKubernetes(cfg)
	}
	if o.tokens == "" || o.state == "" {
		return errors.New("want --tokens, a folder with folders proxies and agents, and --state, a folder to keep things in")
	}
	cfg.Source = kube.NewFolder(kube.FolderConfig{Dir: o.source, Registerer: cfg.Registry, Log: cfg.Log})
	if cfg.Nodes, err = control.OpenTokens(o.tokens, cfg.Log); err != nil {
		return err
	}
	storage, err := control.OpenStorageFolder(o.state)
	if err != nil {
		return err
	}
	cfg.Storage, cfg.Keys = storage, storage.Keys()
	return nil
}

func (o origin) openKubernetes(cfg *control.Config) error {
	namespace, name, ok := strings.Cut(o.account, "/")
	if !ok {
		return fmt.Errorf("--node-account %q: want NAMESPACE/NAME", o.account)
	}
	if o.proxyAudience == "" || o.agentAudience == "" || o.proxyAudience == o.agentAudience {
		return fmt.Errorf("--proxy-audience %q, --agent-audience %q: want two that differ", o.proxyAudience, o.agentAudience)
	}
	if o.statusWrites < 1 || o.statusWrites > maxStatusWrites {
		return fmt.Errorf("--status-writes %d: want 1 to %d", o.statusWrites, maxStatusWrites)
	}
	client, err := kube.NewClient(o.kubeconfig)
	if err != nil {
		return err
	}
	cfg.Source = kube.NewAPI(kube.APIConfig{Client: client, Registerer: cfg.Registry, Log: cfg.Log})
	cfg.Nodes = kube.NewReviewer(kube.ReviewerConfig{
		Client: client.Reviews, ProxyAudience: o.proxyAudience, AgentAudience: o.agentAudience,
		Users: []string{"system:serviceaccount:" + namespace + ":" + name},
	})
	cfg.Storage, cfg.Keys = kube.NewStorage(client, o.namespace), kube.NewKeySecret(client, o.namespace, "tacit-ca")
	cfg.Namespace, cfg.Display = o.namespace, kube.NewDisplay(client, o.statusWrites, cfg.Log)
	cfg.Election = kube.NewElection(kube.ElectionConfig{Client: client, Namespace: o.namespace, Log: cfg.Log})
	return nil
}
