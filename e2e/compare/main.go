// Command compare holds what Tacit makes of AuthorizationPolicies against what istiod makes of
// them. Both read the same API server; istiod is asked over xds as a ztunnel asks it. It makes up
// pods and policies (the seed is printed), waits until both have all of them, and compares what is
// told, and then the decisions about made-up connections.
//
// Where they differ on purpose, docs/policy.md says so. Then Tacit must be the one that denies.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
)

// rootNamespace is istiod's.
const rootNamespace = "istio-system"

type config struct {
	kubeconfig, istiod string
	seed               uint64
	policies           int
	limit              time.Duration
}

func main() {
	cfg := config{seed: uint64(time.Now().UnixNano())}
	flag.StringVar(&cfg.kubeconfig, "kubeconfig", "", "`file` that names the API server")
	flag.StringVar(&cfg.istiod, "istiod", "", "`HOST:PORT` where istiod serves xds in plaintext")
	flag.Uint64Var(&cfg.seed, "seed", cfg.seed, "what pods, policies and connections are made of")
	flag.IntVar(&cfg.policies, "policies", 200, "how many policies are made up")
	flag.DurationVar(&cfg.limit, "limit", 5*time.Minute, "give up after this time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fmt.Println("seed", cfg.seed)
	if err := run(ctx, cfg); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, cfg config) error {
	ctx, cancel := context.WithTimeout(ctx, cfg.limit)
	defer cancel()
	client, err := kube.NewClient(cfg.kubeconfig)
	if err != nil {
		return err
	}
	d := dice{rand.New(rand.NewPCG(cfg.seed, 0))}
	t := d.town(cfg.policies)
	defer t.remove(context.WithoutCancel(ctx), client)
	if err := t.create(ctx, client); err != nil {
		return err
	}
	ours, err := compile(ctx, client, t)
	if err != nil {
		return fmt.Errorf("Tacit: %w", err)
	}
	theirs, err := ask(ctx, cfg.istiod, t)
	if err != nil {
		return fmt.Errorf("istiod: %w", err)
	}
	c := comparison{ours: ours, theirs: theirs}
	c.told(t)
	c.decisions(d, t)
	c.differences(t)
	fmt.Printf("%d policies for %d pods; %d decisions, of them %d let in; %d differ on purpose\n", len(t.policies), len(t.pods), c.asked, c.allowed, c.meant)
	if len(c.wrong) > 0 {
		return errors.New("differ:\n" + strings.Join(c.wrong[:min(len(c.wrong), 20)], "\n"))
	}
	if c.allowed == 0 || c.allowed == c.asked {
		return errors.New("nothing was compared: all decisions are the same")
	}
	return nil
}

// compile is the World that Tacit's control makes of the cluster, once it has all of the town.
func compile(ctx context.Context, client kube.Client, t *town) (*mesh.World, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var w *mesh.World
	builder := kube.NewBuilder(kube.BuildConfig{TrustDomain: trustDomain, Namespace: "tacit-system", RootNamespace: rootNamespace})
	err := kube.NewAPI(kube.APIConfig{Client: client}).Run(ctx, func(events []kube.Event) {
		builder.Apply(events, nil)
		r := builder.Result()
		now := new(mesh.World).With(mesh.Changes{Workloads: r.Workloads, Policies: r.Policies}, time.Time{})
		if t.isIn(now) {
			w = now
			cancel()
		}
	})
	if err == nil && w == nil {
		err = errors.New("not all pods and policies are known in time")
	}
	return w, err
}
