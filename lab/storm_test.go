package lab_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"tacit.dev/lab"
)

const (
	// stormFor is how long things go wrong, and stormPace how often another thing does.
	stormFor  = time.Minute
	stormPace = 700 * time.Millisecond
)

// TestStorm watches both uplinks while all that may go wrong goes wrong, in an order
// that its seed decides (TACIT_SEED): of what the pods of the mesh say to each other
// nothing is seen, and at the end all is as it was.
func TestStorm(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("TACIT_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("TACIT_SEED=%d", seed)
	s := newStorm(t, rand.New(rand.NewPCG(seed, 0)))
	s.begin()
	s.rage()
	s.end()
}

// storm is a lab in which things go wrong.
type storm struct {
	*story
	t    *testing.T
	dice *rand.Rand
	// undo are what has to be done at the end, by name.
	undo map[string]func()
	// happened counts what went wrong.
	happened map[string]int
}

func newStorm(t *testing.T, dice *rand.Rand) *storm {
	dir, err := os.MkdirTemp("", "tacit-storm-")
	if err != nil {
		t.Fatal(err)
	}
	s := &storm{story: &story{dir: dir}, t: t, dice: dice, undo: map[string]func(){}, happened: map[string]int{}}
	t.Cleanup(func() { s.story.end(ending{t}) })
	program, err := exec.LookPath("tacit")
	if err != nil {
		t.Fatal(err)
	}
	if s.stderr, err = os.Create(filepath.Join(dir, "lab.err")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.started, err = lab.Start(ctx, lab.StartConfig{
		Program: program, Dir: dir, Leashed: true, Stderr: s.stderr, Options: []string{"bin=" + os.Getenv("TACIT_BIN")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// ending is a test as testscript sees it.
type ending struct{ *testing.T }

func (e ending) Run(string, func(testscript.T)) { panic("storm: no test within") }
func (e ending) Verbose() bool                  { return testing.Verbose() }

// try asks the lab, and returns what it said.
func (s *storm) try(words ...string) (string, error) { return s.ask(false, words) }

// ask is try, where it may be asked that something is not so.
func (s *storm) ask(not bool, words []string) (string, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := os.CreateTemp(s.dir, "said")
	if err != nil {
		s.t.Fatal(err)
	}
	defer os.Remove(out.Name())
	defer out.Close()
	in, err := os.Open(os.DevNull)
	if err != nil {
		s.t.Fatal(err)
	}
	defer in.Close()
	code, err := lab.Do(ctx, lab.Call{Dir: s.dir, Args: words, WorkDir: s.dir, Not: not, Stdin: in, Stdout: out, Stderr: out})
	_, _ = out.Seek(0, io.SeekStart)
	said, _ := io.ReadAll(out)
	if err == nil && code != 0 {
		err = fmt.Errorf("%q: exit code %d: %s", words, code, bytes.TrimSpace(said))
	}
	return string(said), err
}

// do asks the lab for what must not fail.
func (s *storm) do(words ...string) string {
	s.t.Helper()
	said, err := s.try(words...)
	if err != nil {
		s.t.Fatal(err)
	}
	return said
}

// The pods of the mesh, by their addresses: a lab gives them in order.
var stormPods = map[string]string{"a": "10.30.1.2", "c": "10.30.1.3", "b": "10.30.2.2", "d": "10.30.2.3"}

// chats are who speaks with whom: through a service, to a pod's own address, and by IPv6.
var chats = map[string][2]string{
	"a-web": {"a", "web:80"}, "d-c": {"d", "10.30.1.3:8080"}, "c-web6": {"c", "[fd00:31::1]:80"}, "b-a": {"b", "10.30.1.2:8080"},
}

// begin makes the cluster, and has everybody speak.
func (s *storm) begin() {
	s.do("node", "n1", "n2")
	if err := os.WriteFile(filepath.Join(s.dir, "ranges.yaml"), []byte(ranges), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.do("apply", "ranges.yaml")
	s.do("label", "namespace", "default", "tacit.dev/mesh=on")
	s.do("pod", "n1/a", "sa=a", "app=serve news:8080")
	s.do("pod", "n1/c", "sa=c", "app=serve news:8080")
	s.do("pod", "n2/b", "sa=b", "label=tier=web", "app=serve news:8080")
	s.do("pod", "n2/d", "sa=d", "label=tier=web", "app=serve news:8080")
	s.do("service", "web", "80:8080", "select=tier=web")
	s.do("wait", "protected", "a", "b", "c", "d")
	for _, n := range []string{"n1", "n2"} {
		s.do("capture", "start", n, n)
	}
	for _, name := range slices.Sorted(maps.Keys(chats)) {
		s.do("start", name, chats[name][0], "--", "app", "chatter", "--workers", "6", chats[name][1])
	}
	s.do("start", "inner", "a", "--", "bash", "-c", forwarding)
}

// ranges are from where the addresses of services come, as in every cluster.
const ranges = `apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: ["10.31.0.0/16", "fd00:31::/112"]}
`

// forwarding has a machine within pod a, behind an address of its own, speak to a pod of
// the mesh: as a container within a pod does.
const forwarding = `
unshare --net sleep 600 & inner=$!
until [ "$(readlink /proc/$inner/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
set -e
ip link add in0 type veth peer name in1 netns $inner
ip addr add 10.99.0.1/24 dev in0
ip link set in0 up
echo 1 >/proc/sys/net/ipv4/ip_forward
nsenter --net=/proc/$inner/ns/net sh -c 'ip addr add 10.99.0.2/24 dev in1; ip link set in1 up; ip link set lo up; ip route add default via 10.99.0.1'
while :; do
  nft 'table ip docker { chain post { type nat hook postrouting priority srcnat; ip saddr 10.99.0.0/24 oifname eth0 masquerade; }; }'
  for i in 1 2 3 4 5; do
    nsenter --net=/proc/$inner/ns/net timeout 1 bash -c 'exec 3<>/dev/tcp/10.30.2.2/8080; echo "the salary of Ada" >&3; read -t 1 <&3' || true
  done
  nft delete table ip docker || true
done`

// wrongs are what goes wrong, by name.
func (s *storm) wrongs() map[string]func() {
	pod := func() string { return pick(s.dice, slices.Sorted(maps.Keys(stormPods))) }
	node := func() string { return pick(s.dice, []string{"n1", "n2"}) }
	return map[string]func(){
		"conntrack flushed": func() { s.do("exec", pod(), "app", "conntrack", "flush") },
		"conntrack filled":  func() { s.do("exec", pod(), "app", "conntrack", "fill") },
		"rules flushed":     func() { s.do("exec", pod(), "nft", "flush", "ruleset") },
		"agent killed":      func() { _, _ = s.try("kill", node()+"/agent", "KILL") },
		"proxy killed":      func() { _, _ = s.try("kill", node()+"/proxy", "KILL") },
		"control away":      s.control,
		"service away":      s.service,
		"address contested": s.contested,
	}
}

func pick[T any](dice *rand.Rand, from []T) T { return from[dice.IntN(len(from))] }

// toggle does one of two things, in turn; the end undoes what is done.
func (s *storm) toggle(name string, do, undo func()) {
	if back := s.undo[name]; back != nil {
		delete(s.undo, name)
		back()
		return
	}
	do()
	s.undo[name] = undo
}

func (s *storm) control() {
	s.toggle("control", func() { s.do("stop", "control", "KILL") }, func() { s.do("start", "control") })
}

// service deletes a service, and makes it anew with another address; or it hides it from
// control while kube-proxy goes on to know it.
func (s *storm) service() {
	if back := s.undo["service"]; back != nil || s.dice.IntN(2) == 0 {
		s.toggle("service", func() { s.do("delete", "service", "web") }, func() { s.do("service", "web", "80:8080", "select=tier=web") })
		return
	}
	path := filepath.Join(s.dir, "run", "objects", "service.default.web.yaml")
	s.toggle("service", func() { s.rename(path, s.dir+"/hidden") }, func() { s.rename(s.dir+"/hidden", path) })
}

func (s *storm) rename(from, to string) {
	if err := os.Rename(from, to); err != nil {
		s.t.Fatal(err)
	}
}

// contested has a pod outside of the mesh claim the address of one in it, as a node in
// other hands could.
func (s *storm) contested() {
	name := pick(s.dice, slices.Sorted(maps.Keys(stormPods)))
	path := filepath.Join(s.dir, "run", "objects", "pod.default.rogue.yaml")
	text := fmt.Sprintf(rogue, stormPods[name], time.Now().UTC().Format(time.RFC3339))
	s.toggle("contested",
		func() {
			if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
				s.t.Fatal(err)
			}
			s.rename(path+".new", path)
		},
		func() { _ = os.Remove(path) })
}

const rogue = `apiVersion: v1
kind: Pod
metadata: {namespace: default, name: rogue, uid: rogue, labels: {tacit.dev/mesh: "off"}, creationTimestamp: "%[2]s"}
spec: {nodeName: n2, serviceAccountName: default, containers: [{name: app, image: lab}]}
status: {phase: Running, podIP: %[1]s, podIPs: [{ip: %[1]s}], startTime: "%[2]s", conditions: [{type: Ready, status: "True"}]}
`

// rage has something go wrong at each step, for as long as it lasts.
func (s *storm) rage() {
	wrongs := s.wrongs()
	names := slices.Sorted(maps.Keys(wrongs))
	tick := time.NewTicker(stormPace)
	defer tick.Stop()
	for until := time.Now().Add(stormFor); time.Now().Before(until); <-tick.C {
		name := pick(s.dice, names)
		s.t.Log(time.Now().Format("05.000"), name)
		s.happened[name]++
		wrongs[name]()
	}
}

// keep leaves a capture that tells of a leak where TACIT_LOGS says.
func (s *storm) keep(name string) {
	to := os.Getenv("TACIT_LOGS")
	if to == "" {
		return
	}
	text, err := os.ReadFile(filepath.Join(s.dir, "run", name))
	if err == nil {
		err = os.WriteFile(filepath.Join(to, name), text, 0o644)
	}
	if err != nil {
		s.t.Log(err)
	}
}

var answered = regexp.MustCompile(`answered (\d+),`)

// end puts right what went wrong, and looks at what was seen meanwhile.
func (s *storm) end() {
	for _, name := range slices.Sorted(maps.Keys(s.undo)) {
		s.undo[name]()
	}
	s.do("kill", "inner", "KILL")
	s.do("wait", "protected", "a", "b", "c", "d", "within=30s")
	for _, name := range slices.Sorted(maps.Keys(chats)) {
		said := s.do("stop", name, "INT")
		s.t.Log(name, said)
		if m := answered.FindStringSubmatch(said); m == nil || len(m[1]) < 2 {
			s.t.Errorf("%s: %q: want some answers", name, said)
		}
	}
	for _, n := range []string{"n1", "n2"} {
		if _, err := s.ask(true, []string{"capture", "grep", n, "the salary of Ada"}); err != nil {
			s.t.Errorf("uplink of %s: %v", n, err)
			s.keep(n + ".pcap")
		}
		s.do("capture", "stop", n)
	}
	s.t.Log(s.happened)
	s.do("connect", "a", "10.30.2.2:8080", "timeout=5s")
}
