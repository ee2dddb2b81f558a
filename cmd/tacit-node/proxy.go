package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"tacit.dev/admin"
	"tacit.dev/identity"
	"tacit.dev/memory"
	"tacit.dev/node/proxy"
	"tacit.dev/wire/csr"
	"tacit.dev/wire/xds"
)

// proxyFlags are the proxy's flags, as given.
type proxyFlags struct {
	proxy          proxy.Config
	dial           xds.DialConfig
	admin, metrics string
	agentMetrics   string
	profiles       bool
	ttl            time.Duration
	log            admin.LogConfig
}

func parseProxyFlags(args []string) (*proxyFlags, error) {
	var f proxyFlags
	s := flag.NewFlagSet("tacit-node proxy", flag.ContinueOnError)
	s.StringVar(&f.proxy.Node, "node", "", "`name` of this node")
	s.StringVar(&f.dial.Addr, "control", "", "`HOST:PORT` of tacit-control")
	s.StringVar(&f.dial.TokenFile, "token", "", "`file` with what proves this node's proxy to control")
	s.StringVar(&f.dial.BundleFile, "bundle", "", "`file` with the roots that control's certificate must lead to")
	s.StringVar(&f.proxy.Handle, "handle", "/run/tacit/handle.sock", "`path` of the agent's socket")
	s.StringVar(&f.admin, "admin", "127.0.0.1:15021", "`HOST:PORT` of readiness, metrics and dumps")
	s.BoolVar(&f.profiles, "profiles", false, "serve profiles of this process at --admin, too")
	s.StringVar(&f.metrics, "metrics", "", "`HOST:PORT` of readiness and metrics alone, for what comes over a network; \"\" is none")
	s.StringVar(&f.agentMetrics, "agent-metrics", "", "`path` of the agent's --metrics, which --metrics serves as /metrics/agent; metrics.sock beside that of --handle if empty")
	s.DurationVar(&f.proxy.DialTimeout, "dial-timeout", 150*time.Second, "bound the time in which a connection reaches its other end; the kernel gives up earlier, by the pod's tcp_syn_retries")
	s.DurationVar(&f.proxy.EndpointTimeout, "endpoint-timeout", 5*time.Second, "try another endpoint of a Service when one is silent for so long")
	s.DurationVar(&f.proxy.KeepAlive.Idle, "keepalive-idle", 0, "send keepalive probes on a connection that is quiet for so long; 0 is the pod's tcp_keepalive_time")
	s.DurationVar(&f.proxy.KeepAlive.Interval, "keepalive-interval", 0, "time between two keepalive probes; 0 is the pod's tcp_keepalive_intvl")
	s.IntVar(&f.proxy.KeepAlive.Probes, "keepalive-probes", 0, "reset a connection after so many unanswered keepalive probes; 0 is the pod's tcp_keepalive_probes")
	s.DurationVar(&f.proxy.HandshakeTimeout, "handshake-timeout", 10*time.Second, "how long a peer may take for its TLS handshake")
	s.DurationVar(&f.proxy.AnnounceGrace, "announce-grace", 5*time.Second, "how long a peer and this node may differ on whether a pod is announced; plaintext from a mesh pod waits this long before it is refused")
	s.DurationVar(&f.proxy.HalfCloseTimeout, "half-close-timeout", time.Hour, "how long a half-closed connection may be quiet")
	s.DurationVar(&f.proxy.Drain, "drain", 25*time.Second, "how long, after a signal to end, connections may go on and new ones are served; less than what the kubelet waits (terminationGracePeriodSeconds). 0 resets all at once, and so does a second signal")
	s.IntVar(&f.proxy.MaxConnectionsPerPod, "max-connections-per-pod", 32768, "connections of one pod, both ways together")
	s.IntVar(&f.proxy.MaxHandshakes, "max-handshakes", 512, "TLS handshakes under way, each way, of them half for one pod, and an eighth with one peer of it; more wait for their turn")
	s.DurationVar(&f.proxy.HandshakePatience, "handshake-patience", time.Minute, "how long a connection waits for its turn to make a TLS handshake, each way")
	s.Int64Var(&f.proxy.MaxQueued, "max-queued", 0, "bound the `bytes` of memory for data that waits in all connections because an end reads slowly or not at all; above it the largest connections of the pod that holds most are reset; 0 is five eighths of the container's memory limit (640 MiB without one), and at most 3/64 of the node's memory")
	s.Func("access-log", "which connections have a line in the log: All, Refused (also those that were reset or failed), or Off (default All)", func(text string) error {
		f.proxy.AccessLog = proxy.AccessLog(text)
		return f.proxy.AccessLog.Validate()
	})
	s.DurationVar(&f.ttl, "ttl", 0, "wished life of a certificate; 0 leaves it to control")
	s.StringVar(&f.log.Format, "log-format", "json", "text or json")
	s.StringVar(&f.log.Level, "log-level", "info", "debug, info, warn or error")
	if err := s.Parse(args); err != nil {
		return nil, err
	}
	if s.NArg() > 0 || f.proxy.Node == "" {
		return nil, fmt.Errorf("proxy: want --node, and no arguments (%q)", s.Args())
	}
	f.agentMetrics = cmp.Or(f.agentMetrics, filepath.Join(filepath.Dir(f.proxy.Handle), "metrics.sock"))
	return &f, nil
}

// runProxy is the proxy's flags, Config and Run.
func runProxy(ctx context.Context, args []string) error {
	f, err := parseProxyFlags(args)
	if err != nil {
		return err
	}
	reg := admin.NewRegistry(version)
	f.log.Registry = reg
	log, err := admin.NewLog(f.log)
	if err != nil {
		return err
	}
	if err := dropPrivileges(); err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	if !f.profiles {
		runtime.MemProfileRate = 0 // what samples would be kept in is more than a megabyte
	}
	f.dial.Fallback = controlService()
	conn, err := xds.Dial(f.dial)
	if err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	defer conn.Close()
	return log.While(func() error { return f.serve(ctx, log.Logger, reg, conn) })
}

// maxQueued leaves the rest of the container's memory to what connections need even when nothing waits, and
// of the node's to the sockets of others.
func maxQueued() int64 {
	most := int64(640 << 20)
	if limit, told := memory.Limit(); told {
		most = limit / 8 * 5
	}
	return min(most, memory.TCP()/4*3)
}

// serve runs the proxy and what feeds it until asked ends and nobody needs it any more,
// or one of them fails.
func (f *proxyFlags) serve(asked context.Context, log *slog.Logger, reg *prometheus.Registry, conn *xds.Conn) error {
	signer := csr.NewClient(conn)
	signer.TTL = f.ttl
	keeper := identity.NewKeeper(identity.KeeperConfig{Signer: signer, Log: log})
	reg.MustRegister(firstEnd{keeper})
	cfg := f.proxy
	cfg.Leaves, cfg.TLS = keeper, identity.NewTLS(identity.TLSConfig{})
	cfg.Registry, cfg.Log = reg, log
	if cfg.MaxQueued == 0 {
		cfg.MaxQueued = maxQueued()
	}
	if limit, told := memory.Limit(); told {
		memory.Bound(limit - cfg.MaxQueued)
	}
	p, err := proxy.New(cfg)
	if err != nil {
		return err
	}
	world := xds.NewWorldClient(xds.ClientConfig{Conn: conn, Node: cfg.Node, Log: log, Registry: reg}, p.Apply)
	pairs := xds.NewPairClient(xds.ClientConfig{Conn: conn, Node: cfg.Node, Log: log, Registry: reg}, p.Pairs())
	ctx, end := context.WithCancel(context.WithoutCancel(asked))
	defer end()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { defer end(); outlast(asked, ctx, p.Drain); return nil })
	g.Go(func() error { return keeper.Run(ctx) })
	g.Go(func() error { return world.Run(ctx) })
	g.Go(func() error { return pairs.Run(ctx) })
	g.Go(func() error { return p.Run(ctx) })
	g.Go(func() error { return memory.Run(ctx, memory.Config{Registry: reg, Log: log, Lean: true}) })
	g.Go(func() error {
		return admin.Run(ctx, admin.Config{
			Addr: f.admin, Metrics: f.metrics, Profiles: f.profiles, Registry: reg, Ready: p.Ready, Log: log,
			Beside: map[string]string{"agent": f.agentMetrics},
			Dump: map[string]func() any{
				"pods":         func() any { return p.Pods() },
				"certificates": func() any { return keeper.Dump() },
			},
		})
	})
	log.Info("proxy runs", "node", cfg.Node, "handle", cfg.Handle)
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// firstEnd collects when the first leaf ends, if there is one: an identity each would be a label
// without a bound.
type firstEnd struct{ keeper *identity.Keeper }

var firstEndDesc = prometheus.NewDesc("tacit_certificate_expiry_timestamp_seconds",
	"When the first of this node's workload certificates ends. They are renewed at half of their life.", nil, nil)

func (f firstEnd) Describe(ch chan<- *prometheus.Desc) { ch <- firstEndDesc }

func (f firstEnd) Collect(ch chan<- prometheus.Metric) {
	if end := f.keeper.FirstEnd(); !end.IsZero() {
		ch <- prometheus.MustNewConstMetric(firstEndDesc, prometheus.GaugeValue, float64(end.Unix()))
	}
}
