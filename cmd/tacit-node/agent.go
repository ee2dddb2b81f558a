package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"tacit.dev/admin"
	"tacit.dev/memory"
	"tacit.dev/node/agent"
	"tacit.dev/wire/xds"
)

// agentFlags are the agent's flags, as given.
type agentFlags struct {
	agent    agent.Config
	node     string
	dial     xds.DialConfig
	admin    string
	metrics  string
	profiles bool
	exempt   string
	drain    time.Duration
	log      admin.LogConfig
}

func parseAgentFlags(args []string) (*agentFlags, error) {
	var f agentFlags
	s := flag.NewFlagSet("tacit-node agent", flag.ContinueOnError)
	s.StringVar(&f.node, "node", "", "`name` of this node")
	s.StringVar(&f.dial.Addr, "control", "", "`HOST:PORT` of tacit-control")
	s.StringVar(&f.dial.TokenFile, "token", "", "`file` with what proves this node's agent to control")
	s.StringVar(&f.dial.BundleFile, "bundle", "", "`file` with the roots that control's certificate must lead to")
	s.StringVar(&f.agent.RunDir, "run", "/run/tacit", "`folder` of the node: cni.sock, the records of pods, and what one agent hands over to the next by")
	s.StringVar(&f.agent.Handle, "handle", "", "`path` of the socket for the proxy, in a folder that no other agent has; handle.sock in that of --run if empty")
	s.IntVar(&f.agent.ProxyUID, "proxy-uid", 0, "`uid` of the proxy, who alone may connect to that socket; 0 is our own")
	s.Func("node-address", "`address` of this node, from which its kubelet probes pods, besides the pods' gateways; may be repeated, or a list", func(s string) error {
		for text := range strings.SplitSeq(s, ",") {
			a, err := netip.ParseAddr(text)
			if err != nil {
				return err
			}
			f.agent.NodeAddresses = append(f.agent.NodeAddresses, a.Unmap())
		}
		return nil
	})
	s.StringVar(&f.agent.Proc, "proc", "", "`folder` where a proc file system shows all processes of the node, to find running pods; \"\" finds none")
	s.StringVar(&f.agent.Chain.Dir, "cni-dir", "", "`folder` of the node's CNI configurations, to put the plugin into their chain; \"\" leaves them alone")
	s.StringVar(&f.exempt, "cni-exempt", "kube-system,tacit-system", "`namespaces` whose pods begin without a question to us, with commas: those that we need to begin ourselves")
	s.StringVar(&f.agent.Program, "cni-program", "/tacit-cni", "`file` of the plugin, with --cni-bin-dir")
	s.StringVar(&f.agent.ProgramDir, "cni-bin-dir", "", "`folder` of the node's CNI plugins, to put ours there; \"\" leaves it alone")
	s.DurationVar(&f.drain, "drain", 0, "how long, after a signal to end, to go on for a proxy that is connected, which may drain; 0 ends at once, and so does a second signal")
	s.StringVar(&f.admin, "admin", "", "`path` of a socket, for our own user alone, of readiness, metrics and dumps; admin.sock beside that of --handle if empty")
	s.StringVar(&f.metrics, "metrics", "", "`path` of a socket of --proxy-uid's, of readiness and metrics alone, which the proxy passes on; metrics.sock beside that of --handle if empty")
	s.BoolVar(&f.profiles, "profiles", false, "serve profiles of this process at --admin, too")
	s.DurationVar(&f.agent.CheckInterval, "check-interval", 10*time.Second, "how often rules are read back when nobody seems to have changed them")
	s.IntVar(&f.agent.UnreadPerSocket, "unread-per-socket", 2<<20, "bound the `bytes` of kernel memory in which received data waits for the proxy, of each socket; 0 leaves it to the kernel (net.ipv4.tcp_rmem)")
	s.StringVar(&f.log.Format, "log-format", "json", "text or json")
	s.StringVar(&f.log.Level, "log-level", "info", "debug, info, warn or error")
	if err := s.Parse(args); err != nil {
		return nil, err
	}
	if s.NArg() > 0 || f.node == "" {
		return nil, fmt.Errorf("agent: want --node, and no arguments (%q)", s.Args())
	}
	beside := filepath.Dir(cmp.Or(f.agent.Handle, filepath.Join(f.agent.RunDir, "handle.sock")))
	f.admin = cmp.Or(f.admin, filepath.Join(beside, "admin.sock"))
	f.metrics = cmp.Or(f.metrics, filepath.Join(beside, "metrics.sock"))
	f.agent.Exempt = strings.FieldsFunc(f.exempt, func(r rune) bool { return r == ',' || r == ' ' })
	return &f, nil
}

// runAgent is the agent's flags, Config and Run.
func runAgent(ctx context.Context, args []string) error {
	f, err := parseAgentFlags(args)
	if err != nil {
		return err
	}
	reg := admin.NewRegistry(version)
	f.log.Registry = reg
	log, err := admin.NewLog(f.log)
	if err != nil {
		return err
	}
	f.dial.Fallback = controlService()
	conn, err := xds.Dial(f.dial)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	defer conn.Close()
	return log.While(func() error { return f.serve(ctx, log.Logger, reg, conn) })
}

// control is there before the clients that it carries words and reports by.
type control struct {
	pods       *xds.PodClient
	namespaces *xds.NamespaceClient
}

func (c *control) Report(r xds.Report) { c.pods.Report(r) }

func (c *control) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.pods.Run(ctx) })
	g.Go(func() error { return c.namespaces.Run(ctx) })
	return g.Wait()
}

// serve runs the agent and what feeds it until asked ends and no proxy drains, or one of them fails.
func (f *agentFlags) serve(asked context.Context, log *slog.Logger, reg *prometheus.Registry, conn *xds.Conn) error {
	var c control
	cfg := f.agent
	cfg.Reporter, cfg.Control, cfg.Registry, cfg.Log = &c, c.Run, reg, log
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	client := xds.ClientConfig{Conn: conn, Node: f.node, Log: log, Registry: reg}
	c.pods = xds.NewPodClient(client, a.Apply)
	c.namespaces = xds.NewNamespaceClient(client, a.ApplyNamespaces)
	if err := os.MkdirAll(filepath.Dir(f.admin), 0o711); err != nil {
		return err
	}
	ctx, end := context.WithCancel(context.WithoutCancel(asked))
	defer end()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { defer end(); outlast(asked, ctx, f.awaitProxy(a)); return nil })
	g.Go(func() error { return a.Run(ctx) })
	g.Go(func() error { return memory.Run(ctx, memory.Config{Registry: reg, Log: log}) })
	g.Go(func() error {
		return admin.Run(ctx, admin.Config{
			Addr: f.admin, Metrics: f.metrics, MetricsUID: cfg.ProxyUID, Profiles: f.profiles,
			Registry: reg, Log: log, Ready: func() error { return ready(a, c.pods) },
			Dump: map[string]func() any{"pods": func() any { return a.Dump() }},
		})
	})
	log.Info("agent runs", "node", f.node, "run", cfg.RunDir)
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// awaitProxy has a go on for its proxy for as long as --drain says.
func (f *agentFlags) awaitProxy(a *agent.Agent) func(context.Context) {
	return func(ctx context.Context) {
		if f.drain <= 0 {
			return
		}
		ctx, cancel := context.WithTimeout(ctx, f.drain)
		defer cancel()
		a.Drain(ctx)
	}
}

// ready says why the agent is not.
func ready(a *agent.Agent, c *xds.PodClient) error {
	if err := a.Ready(); err != nil {
		return err
	}
	select {
	case <-a.Recovered():
	default:
		return errors.New("the pods of the last agent are not all looked at")
	}
	select {
	case <-c.Synced():
		return nil
	default:
		return errors.New("control has not spoken yet")
	}
}
