package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tacit.dev/admin"
	"tacit.dev/bench/scale/api"
	"tacit.dev/control"
	"tacit.dev/control/kube"
	"tacit.dev/memory"
)

// The namespace and the account that nodes' tokens are of, and whom they are for.
const (
	namespace     = "tacit-system"
	account       = "system:serviceaccount:tacit-system:tacit-node"
	proxyAudience = "tacit-proxy"
	agentAudience = "tacit-agent"
)

// heapLimit is what tacit-control would make of a container's limit of 1,500 MB.
const heapLimit = 1_350_000_000

// planeFlags are those of tacit-control in a lab, as far as they matter here, and our own.
type planeFlags struct {
	listen, admin, trustDomain, kubeconfig, api, name string
	leashed                                           bool
}

func parsePlaneFlags(args []string) (f planeFlags, err error) {
	s := flag.NewFlagSet("control", flag.ContinueOnError)
	s.StringVar(&f.listen, "listen", "", "HOST:PORT for the nodes")
	s.StringVar(&f.admin, "admin", "", "HOST:PORT of metrics")
	s.StringVar(&f.trustDomain, "trust-domain", "lab", "trust domain")
	s.StringVar(&f.kubeconfig, "kubeconfig", "", "file that names the API server")
	s.StringVar(&f.api, "api", "", "URL of the API server")
	s.StringVar(&f.name, "replica", "a", "name among the replicas")
	s.BoolVar(&f.leashed, "leashed", false, "end when standard input does")
	for _, ignored := range []string{"source", "state", "tokens", "log-format"} {
		s.String(ignored, "", "is ignored")
	}
	s.Bool("profiles", true, "is ignored")
	return f, s.Parse(args)
}

// runPlane is tacit-control, but for the way in which the conditions of many pods are written
// at once.
func runPlane(ctx context.Context, args []string) error {
	f, err := parsePlaneFlags(args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if f.leashed {
		go endWith(os.Stdin, cancel) // ends with the process at the latest
	}
	cfg := control.Config{
		Registry: admin.NewRegistry("bench"), Listen: f.listen, Advertise: f.listen, Admin: f.admin, Profiles: true,
		TrustDomain: f.trustDomain, Namespace: namespace, Names: []string{"127.0.0.1", "127.0.0.2", "172.30.0.250"},
	}
	log, err := admin.NewLog(admin.LogConfig{Registry: cfg.Registry, Format: "text", Level: "info"})
	if err != nil {
		return err
	}
	cfg.Log = log.Logger
	memory.Bound(heapLimit)
	client, err := kube.NewClient(f.kubeconfig)
	if err != nil {
		return err
	}
	cfg.Source = kube.NewAPI(kube.APIConfig{Client: client, Registerer: cfg.Registry, Log: cfg.Log})
	cfg.Nodes = kube.NewReviewer(kube.ReviewerConfig{Client: client.Reviews, ProxyAudience: proxyAudience, AgentAudience: agentAudience, Users: []string{account}})
	cfg.Storage, cfg.Keys = kube.NewStorage(client, namespace), kube.NewKeySecret(client, namespace, "tacit-ca")
	cfg.Display = &display{url: f.api + api.BulkPath, few: kube.NewDisplay(client, 0, cfg.Log)}
	cfg.Election = kube.NewElection(kube.ElectionConfig{Client: client, Namespace: namespace, Name: f.name, Log: cfg.Log})
	return log.While(func() error {
		c, err := control.New(cfg)
		if err != nil {
			return err
		}
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return c.Run(ctx) })
		g.Go(func() error { return memory.Run(ctx, memory.Config{Registry: cfg.Registry, Log: cfg.Log}) })
		return g.Wait()
	})
}

func endWith(r io.Reader, cancel context.CancelFunc) {
	_, _ = io.Copy(io.Discard, r)
	cancel()
}

// bulkFrom is from how many conditions on they are written in bulk: after the enrollment of
// many pods, which would otherwise take as many hundredths of a second.
const bulkFrom = 200

// display writes the conditions of a few pods as in any cluster, and those of many at once.
type display struct {
	url string
	few *kube.Display
}

func (d *display) Show(ctx context.Context, v kube.View) error {
	if len(v.Pods) < bulkFrom {
		return d.few.Show(ctx, v)
	}
	all := make([]api.Conditions, len(v.Pods))
	for i, p := range v.Pods {
		all[i] = api.Conditions{Namespace: p.Namespace, Name: p.Name}
		if w := p.Want; w.Status != "" {
			all[i].Conditions = []corev1.PodCondition{{Type: kube.ConditionProtected, Status: corev1.ConditionStatus(w.Status), Reason: w.Reason, Message: w.Message, LastTransitionTime: metav1.Now()}}
		}
	}
	body, err := json.Marshal(all)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("show conditions of %d pods: %s", len(all), answer.Status)
	}
	v.Pods = nil
	return d.few.Show(ctx, v)
}

// kubeconfig names an API server that asks for nothing.
func kubeconfig(url string) string {
	return strings.ReplaceAll(`apiVersion: v1
kind: Config
clusters: [{name: bench, cluster: {server: "URL"}}]
contexts: [{name: bench, context: {cluster: bench}}]
current-context: bench
`, "URL", url)
}
