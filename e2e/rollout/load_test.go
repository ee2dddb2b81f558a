package rollout

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"tacit.dev/e2e/mesh"
)

//go:embed testdata/app.yaml
var app string

// shop is the application: servers, and clients that load them.
type shop struct {
	mesh.Case
	// heard is how many lines of the collector were read.
	heard int
}

// result is what one client says of one kind of its connections: see e2e/load.
type result struct {
	Pod   string        `json:"pod"`
	Kind  string        `json:"kind"`
	Codes map[int]int64 `json:"codes"`
	// Sockets are the connections that it took.
	Sockets int64   `json:"sockets"`
	Slowest float64 `json:"slowest"`
	// Seconds is how long it asked.
	Seconds float64 `json:"seconds"`
}

func (r result) requests() (all, failed int64) {
	for code, n := range r.Codes {
		all += n
		if code != 200 {
			failed += n
		}
	}
	return all, failed
}

func openShop(t *testing.T, m *mesh.Mesh) *shop {
	s := &shop{Case: mesh.Case{T: t, Mesh: m}}
	s.Apply(app)
	s.Kubectl("rollout", "status", "-n", "shop", "deployment/server")
	s.Kubectl("wait", "-n", "outside", "--for=condition=Ready", "pod/collector", "--timeout=110s")
	s.protected(true)
	return s
}

// load has two clients ask while change runs, and returns what became of it. Each of
// them asks 50 times a second on kept connections, and 50 times on new ones.
func (s *shop) load(change func()) []result {
	s.T.Helper()
	s.Kubectl("scale", "-n", "shop", "deployment/client", "--replicas=2")
	s.Kubectl("rollout", "status", "-n", "shop", "deployment/client")
	s.steady(aWhile)
	change()
	s.steady(aWhile)
	s.Kubectl("scale", "-n", "shop", "deployment/client", "--replicas=0")
	s.Kubectl("wait", "-n", "shop", "--for=delete", "pod", "-l", "app=client", "--timeout=110s")
	return s.results()
}

// aWhile is how long requests go on before and after a change, so that what it does
// to them is among those that are counted.
const aWhile = 2 * time.Second

// steady lets requests go on while nothing is done.
func (s *shop) steady(long time.Duration) {
	select {
	case <-time.After(long): // the length of a load, not a wait for something
	case <-s.T.Context().Done():
	}
}

// results are those that have come since the last call, two of each client.
func (s *shop) results() (list []result) {
	s.T.Helper()
	lines := bufio.NewScanner(strings.NewReader(s.Kubectl("logs", "-n", "outside", "collector")))
	for n := 0; lines.Scan(); n++ {
		if n < s.heard {
			continue
		}
		s.heard++
		var r result
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			s.T.Fatalf("the collector heard %q: %v", lines.Text(), err)
		}
		list = append(list, r)
	}
	return list
}

// noneFailed fails the test if a request of these kinds did, if one was answered late,
// or if clients did not ask as they should; and says what became of all.
func (s *shop) noneFailed(list []result, clients int, kinds ...string) {
	s.T.Helper()
	failed := map[string]int64{}
	var all, again int64
	var slowest, due float64
	for _, r := range list {
		n, bad := r.requests()
		all += n
		failed[r.Kind] += bad
		due += r.Seconds * rate
		slowest = max(slowest, r.Slowest)
		if r.Kind == "kept" {
			again += r.Sockets - threads
		}
		if bad > 0 {
			s.T.Logf("%s, %s connections: %v", r.Pod, r.Kind, r.Codes)
		}
	}
	s.T.Logf("%d requests of %d runs, the slowest took %.2f s; %d failed on kept connections, of which %d ended and were made again, and %d on new ones",
		all, len(list), slowest, failed["kept"], again, failed["new"])
	for _, kind := range kinds {
		if failed[kind] > 0 {
			s.T.Errorf("%d requests on %s connections failed. Agents and proxies:\n%s", failed[kind], kind, s.trouble())
		}
	}
	if len(kinds) > 0 && slowest > late {
		s.T.Errorf("the slowest request took %.2f s, want %d at most. Agents and proxies:\n%s", slowest, late, s.trouble())
	}
	if len(list) != 2*clients || float64(all) < due/4 {
		s.T.Errorf("%d results with %d requests: want %d results, and at least a quarter of the %.0f requests that were due", len(list), all, 2*clients, due)
	}
}

const (
	// rate is how often a client asks in a second, by each kind of connections.
	rate = 50
	// threads are those of a client that ask at the same time, each on a connection of its own.
	threads = 4
	// late is after how many seconds an answer counts as none.
	late = 5
)

// trouble is what agents and proxies say beside connections that went well and quickly.
func (s *shop) trouble() string {
	s.T.Helper()
	var lines strings.Builder
	for _, pod := range s.pods("tacit-system", "app.kubernetes.io/name=tacit-node") {
		for line := range strings.Lines(s.Kubectl("logs", "-n", "tacit-system", pod, "--all-containers", "--prefix", "--timestamps")) {
			if !wentWell.MatchString(line) {
				lines.WriteString(line)
			}
		}
	}
	return lines.String()
}

// wentWell is the access log's line of a connection that was as it should be, and took
// less than a second.
var wentWell = regexp.MustCompile(`"connection closed".*"duration":[0-9]{1,9}}\s*$`)

// pods are the names of a namespace's pods with that label.
func (s *shop) pods(namespace, label string) []string {
	s.T.Helper()
	return strings.Fields(s.Kubectl("get", "pods", "-n", namespace, "-l", label, "-o", `jsonpath={range .items[*]}{.metadata.name}{" "}{end}`))
}

// protected waits until every pod of the shop is, or none any more.
func (s *shop) protected(want bool) {
	s.T.Helper()
	s.Await(fmt.Sprintf("protected is %v", want), func(ctx context.Context) error {
		out, err := s.Mesh.Kubectl(ctx, "get", "pods", "-n", "shop", "-o",
			`jsonpath={range .items[?(@.status.phase=="Running")]}{.metadata.name}={.status.conditions[?(@.type=="tacit.dev/Protected")].status}{"\n"}{end}`)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if is := strings.HasSuffix(strings.TrimSpace(line), "=True"); is != want {
				return fmt.Errorf("pod %s", strings.TrimSpace(line))
			}
		}
		return nil
	})
}
