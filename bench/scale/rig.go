package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/rpc"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"

	"tacit.dev/bench/process"
	"tacit.dev/bench/scale/api"
	"tacit.dev/bench/scale/cluster"
	"tacit.dev/bench/scale/fleet"
	"tacit.dev/control/kube"
	"tacit.dev/mesh"
	"tacit.dev/pause"
)

// rig is everything of one size of the cluster:
//
//	this process          processes of their own, in the network of the lab if there is one
//	cluster ─► api ◄───── control a, control b ◄── fleet (all simulated nodes)
//	                                           ◄── agent and proxy of the real node
type rig struct {
	cfg     config
	dir     string
	store   *api.Store
	server  *api.Server
	cluster *cluster.Cluster
	place   place
	url     string // of the API server

	replicas []*replica
	fleet    *child
	calls    *rpc.Client

	ending context.CancelFunc
	ended  *errgroup.Group // of this process's goroutines

	mu     sync.Mutex // guards what follows
	tokens map[string]mesh.Process
	shown  map[string]int // conditions that control has written, by reason
}

// replica is one process of control.
type replica struct {
	name, listen, admin string
	process             func() (process.Process, error)
	stop                func() error
	// kill ends the process at once and keeps it away, revive has it come back; nil if it
	// does not.
	kill, revive func(ctx context.Context) error
}

func newRig(ctx context.Context, cfg config, pods int) (_ *rig, err error) {
	r := &rig{cfg: cfg, store: api.NewStore(), tokens: make(map[string]mesh.Process), shown: make(map[string]int)}
	if r.dir, err = os.MkdirTemp("", "tacit-scale-"); err != nil {
		return nil, err
	}
	background, cancel := context.WithCancel(ctx)
	r.ending = cancel
	r.ended, background = errgroup.WithContext(background)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.tail(), r.down())
		}
	}()
	r.cluster = cluster.New(cluster.Config{Seed: cfg.seed, Pods: pods, Nodes: cfg.nodes, Store: r.store})
	r.server = api.NewServer(api.Config{Store: r.store, Review: r.review, Shown: r.note})
	r.ended.Go(func() error { return r.cluster.Run(background) })
	if err := r.makeTokens(); err != nil {
		return nil, err
	}
	if cfg.bin == "" {
		r.place, err = newLoopback()
	} else {
		r.place, err = r.newLab(ctx)
	}
	if err != nil {
		return nil, err
	}
	return r, r.start(ctx, background)
}

func (r *rig) kubeconfig() string { return filepath.Join(r.dir, "kubeconfig") }

func (r *rig) bundle() string { return filepath.Join(r.dir, "bundle.pem") }

// start starts what is not there before the network is.
func (r *rig) start(ctx, background context.Context) error {
	l, err := r.place.listen()
	if err != nil {
		return err
	}
	r.url = "http://" + l.Addr().String()
	if err := os.WriteFile(r.kubeconfig(), []byte(kubeconfig(r.url)), 0o644); err != nil {
		return err
	}
	r.ended.Go(func() error { return r.server.Run(background, l) })
	if err := r.startReplicas(); err != nil {
		return err
	}
	if err := r.awaitBundle(ctx); err != nil {
		return err
	}
	r.fleet, err = startChild(r, "fleet", "fleet", "-nodes", fmt.Sprint(r.cfg.nodes), "-control", r.replicas[0].listen+","+r.replicas[1].listen,
		"-tokens", filepath.Join(r.dir, "tokens"), "-bundle", r.bundle())
	if err != nil {
		return err
	}
	r.calls = rpc.NewClient(duplex{r.fleet.stdout, r.fleet.stdin})
	return nil
}

// makeTokens gives every simulated process a token.
func (r *rig) makeTokens() error {
	for _, folder := range []string{"proxies", "agents"} {
		dir := filepath.Join(r.dir, "tokens", folder)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		for i := range r.cfg.nodes {
			p := mesh.Process{Node: cluster.NodeName(i), Agent: folder == "agents"}
			token := rand.Text()
			r.tokens[token] = p
			if err := os.WriteFile(filepath.Join(dir, p.Node), []byte(token), 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// review is the API server's answer to a TokenReview.
func (r *rig) review(token string) (audience, user, node string, ok bool) {
	r.mu.Lock()
	p, ok := r.tokens[token]
	r.mu.Unlock()
	if !ok {
		p, ok = r.place.owner(token)
	}
	if audience = proxyAudience; p.Agent {
		audience = agentAudience
	}
	return audience, account, p.Node, ok
}

// note counts what people are shown of pods.
func (r *rig) note(_, _ string, c corev1.PodCondition) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shown[c.Reason]++
}

// harmed is how many pods were shown as left or of nobody known.
func (r *rig) harmed() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.shown[kube.AgentAway] + r.shown[kube.Leaving]
}

// startReplicas starts those that are not there.
func (r *rig) startReplicas() (err error) {
	if r.replicas, err = r.place.replicas(); err != nil {
		return err
	}
	for _, one := range r.replicas {
		if one.process != nil {
			continue
		}
		c, err := startChild(r, "control-"+one.name, "control", "-leashed", "-replica", one.name, "-listen", one.listen, "-admin", one.admin,
			"-kubeconfig", r.kubeconfig(), "-api", r.url)
		if err != nil {
			return err
		}
		one.process = func() (process.Process, error) { return c.process, nil }
		one.stop, one.kill = c.stop, c.kill
	}
	return nil
}

// awaitBundle waits for the roots, and puts them where nodes look for them.
func (r *rig) awaitBundle(ctx context.Context) error {
	return r.until(ctx, "there are roots", func() (bool, error) {
		m, ok := r.store.Get(api.ConfigMaps, namespace, kube.BundleMap).(*corev1.ConfigMap)
		if !ok {
			return false, nil
		}
		text := []byte(m.Data["bundle.pem"])
		return true, errors.Join(os.WriteFile(r.bundle(), text, 0o644), r.place.putBundle(text))
	})
}

// leader is the replica that holds the Lease, nil if there is none.
func (r *rig) leader() *replica {
	l, ok := r.store.Get(api.Leases, namespace, "tacit-control").(*coordinationv1.Lease)
	if !ok || l.Spec.HolderIdentity == nil {
		return nil
	}
	for _, one := range r.replicas {
		if *l.Spec.HolderIdentity == one.name+"@"+one.listen {
			return one
		}
	}
	return nil
}

// until asks again and again, for as long as the patience lasts.
func (r *rig) until(ctx context.Context, what string, is func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.patience)
	defer cancel()
	for {
		ok, err := is()
		if ok || err != nil {
			return err
		}
		if !pause.For(ctx, 20*time.Millisecond) {
			return fmt.Errorf("wait until %s: %w", what, ctx.Err())
		}
	}
}

// call asks the process of the nodes.
func call[T any](r *rig, method string, arg any) (answer T, err error) {
	if err := r.calls.Call("Fleet."+method, arg, &answer); err != nil {
		return answer, fmt.Errorf("ask the nodes to %s: %w", method, err)
	}
	return answer, nil
}

func (r *rig) status() (fleet.Status, error) { return call[fleet.Status](r, "Status", None{}) }

// down ends everything and removes what the run made.
func (r *rig) down() error {
	var errs []error
	if r.calls != nil {
		r.calls.Close()
	}
	if r.fleet != nil {
		errs = append(errs, r.fleet.stop())
	}
	for _, one := range r.replicas {
		if one.stop != nil {
			errs = append(errs, one.stop())
		}
	}
	if r.place != nil {
		errs = append(errs, r.place.down())
	}
	r.ending()
	return errors.Join(append(errs, r.ended.Wait(), os.RemoveAll(r.dir))...)
}
