package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tacit.dev/bench/process"
	"tacit.dev/lab"
	"tacit.dev/pause"
)

// Ports: of the servers, and what stands before them in the plain pods.
const (
	iperfPort = "5201"
	httpPort  = "8080"
	// shift from a server's port to that of the splicing, or copying, proxy before it.
	spliceDigit = "2"
	copyDigit   = "3"
)

// holders is how many pods take the held connections: from one pod to one other
// there are only as many source ports for direct connections as
// mesh.DirectPortFirst leaves.
const holders = 4

// mode is what stands between client and server.
type mode struct {
	name string
	// client is the pod from which the load comes.
	client string
	// address leads to a port of the server.
	address func(port string) string
	// bulk: it is there to be compared in throughput only.
	bulk bool
	// proxies are the processes that carry the bytes.
	proxies []process.Process
}

// rig is a running lab with four pods, the same two servers on either side:
//
//	node n1                          node n2
//	plain/client ── (splice) ─────── (splice) ── plain/server
//	mesh/client ─── tacit ────────── tacit ───── mesh/server, mesh/held-1…
type rig struct {
	dir   string
	lab   *lab.Started
	tools string // folder of splice and load
	modes []mode
}

func newRig(ctx context.Context, cfg config) (_ *rig, err error) {
	r := &rig{dir: lab.Folder(fmt.Sprintf("bench-%d", os.Getpid()))}
	if r.tools, err = os.MkdirTemp("", "tacit-bench-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.tail(), r.down())
		}
	}()
	if err := r.build(ctx); err != nil {
		return nil, err
	}
	start := lab.StartConfig{
		Program: filepath.Join(cfg.bin, "tacit"), Dir: r.dir,
		Options: []string{"bin=" + cfg.bin}, Leashed: true, Stderr: os.Stderr,
	}
	if r.lab, err = lab.Start(ctx, start); err != nil {
		return nil, err
	}
	if err := r.populate(ctx); err != nil {
		return nil, err
	}
	return r, r.findModes(ctx)
}

// build makes the baseline and the load. They may run in the pods of other users.
func (r *rig) build(ctx context.Context) error {
	if err := os.Chmod(r.tools, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", r.tools+"/", "tacit.dev/bench/splice", "tacit.dev/bench/load")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the splicing proxy and the load: %w\n%s", err, out)
	}
	return nil
}

// down ends the lab and removes what the run made.
func (r *rig) down() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return errors.Join(lab.Down(ctx, r.dir), os.RemoveAll(r.tools))
}

// tail is the end of the logs, for when the lab did not come up.
func (r *rig) tail() error {
	var errs []error
	logs, err := filepath.Glob(filepath.Join(r.dir, "run", "logs", "*.log"))
	for _, path := range logs {
		text, err := os.ReadFile(path)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		last := lines[max(0, len(lines)-5):]
		errs = append(errs, err, fmt.Errorf("%s:\n\t%s", filepath.Base(path), strings.Join(last, "\n\t")))
	}
	return errors.Join(append(errs, err)...)
}

// saveLogs copies the logs of all processes before they are gone.
func (r *rig) saveLogs(to string) error {
	if to == "" {
		return nil
	}
	return os.CopyFS(to, os.DirFS(filepath.Join(r.dir, "run", "logs")))
}

func (r *rig) populate(ctx context.Context) error {
	verbs := []string{
		"node n1 n2",
		"label namespace plain tacit.dev/mesh=off",
		"label namespace mesh tacit.dev/mesh=on",
		"pod n1/plain/client", "pod n2/plain/server", "pod n1/mesh/client", "pod n2/mesh/server",
		"wait protected mesh/client mesh/server",
		"start plain-iperf3 plain/server -- iperf3 -s -p " + iperfPort,
		"start mesh-iperf3 mesh/server -- iperf3 -s -p " + iperfPort,
		"start plain-answer plain/server -- load answer " + httpPort,
		"start mesh-answer mesh/server -- load answer " + httpPort,
	}
	for i := range holders {
		verbs = append(verbs, fmt.Sprintf("pod n2/mesh/held-%d", i), fmt.Sprintf("start held-%d mesh/held-%d -- load answer %s", i, i, httpPort))
	}
	for _, words := range verbs {
		if err := r.do(ctx, words); err != nil {
			return err
		}
	}
	return nil
}

// do has the lab carry out a verb.
func (r *rig) do(ctx context.Context, words string) error {
	_, err := r.output(ctx, strings.Fields(words)...)
	return err
}

// output carries out a verb and returns what it prints. After "--" stands a
// command; splice and load are found without their folder.
func (r *rig) output(ctx context.Context, words ...string) (string, error) {
	out, err := os.CreateTemp(r.tools, "output-")
	if err != nil {
		return "", err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return "", err
	}
	defer null.Close()
	code, err := lab.Do(ctx, lab.Call{Dir: r.dir, Args: r.located(words), Stdin: null, Stdout: out, Stderr: out})
	text, readErr := os.ReadFile(out.Name())
	if err == nil {
		err = readErr
	}
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(words, " "), err, bytes.TrimSpace(text))
	}
	return string(text), nil
}

func (r *rig) located(words []string) []string {
	words = slices.Clone(words)
	if i := slices.Index(words, "--") + 1; i > 0 && (words[i] == "splice" || words[i] == "load") {
		words[i] = filepath.Join(r.tools, words[i])
	}
	return words
}

// findModes starts the splicing proxies and finds all processes.
func (r *rig) findModes(ctx context.Context) error {
	plain, err := r.podIP(ctx, "plain/server")
	if err != nil {
		return err
	}
	meshed, err := r.podIP(ctx, "mesh/server")
	if err != nil {
		return err
	}
	near, far := "", ""
	for _, port := range []string{iperfPort, httpPort} {
		near += fmt.Sprintf(" 127.0.0.1:%s=%s:%s%s", port, plain, spliceDigit, port)
		far += fmt.Sprintf(" %s:%s%s=127.0.0.1:%s", plain, spliceDigit, port, port)
	}
	copied := copyDigit + iperfPort
	if err := errors.Join(
		r.do(ctx, "start splice-client plain/client -- splice"+near),
		r.do(ctx, "start splice-server plain/server -- splice"+far),
		r.do(ctx, fmt.Sprintf("start copy-client plain/client -- splice --copy 127.0.0.1:%s=%s:%s", copied, plain, copied)),
		r.do(ctx, fmt.Sprintf("start copy-server plain/server -- splice --copy %s:%s=127.0.0.1:%s", plain, copied, iperfPort))); err != nil {
		return err
	}
	r.modes = []mode{
		{name: "none", client: "plain/client", address: func(port string) string { return plain + ":" + port }},
		{name: "splice", client: "plain/client", address: func(port string) string { return "127.0.0.1:" + port }},
		{name: "tacit", client: "mesh/client", address: func(port string) string { return meshed + ":" + port }},
		{name: "copy", client: "plain/client", bulk: true, address: func(port string) string { return "127.0.0.1:" + copyDigit + port }},
	}
	if err := r.awaitServers(ctx); err != nil {
		return err
	}
	return r.findProcesses()
}

func (r *rig) podIP(ctx context.Context, pod string) (string, error) {
	ip, err := r.output(ctx, "exec", pod, "--", "printenv", "POD_IP")
	return strings.TrimSpace(ip), err
}

// awaitServers waits until every way leads to an answer.
func (r *rig) awaitServers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, m := range r.modes {
		if m.bulk {
			continue // it has no HTTP server; that it stands, its first measurement shows
		}
		words := []string{"exec", m.client, "--", "load", "hold", "1", m.address(httpPort)}
		_, err := r.output(ctx, words...)
		for err != nil {
			if !pause.For(ctx, 100*time.Millisecond) {
				return fmt.Errorf("no answer with %s between client and server: %w", m.name, err)
			}
			_, err = r.output(ctx, words...)
		}
	}
	return nil
}

// findProcesses finds the proxies of either kind by their command lines.
func (r *rig) findProcesses() error {
	all, err := process.Descendants(r.lab.Process.Pid)
	if err != nil {
		return err
	}
	splice, tacit, copying := &r.modes[1].proxies, &r.modes[2].proxies, &r.modes[3].proxies
	for pid, words := range all {
		if len(words) == 0 {
			continue
		}
		switch filepath.Base(words[0]) {
		case "splice":
			into, what, first := splice, "splice", words[1]
			if first == "--copy" {
				into, what, first = copying, "copy", words[2]
			}
			side := "server"
			if strings.HasPrefix(first, "127.") {
				side = "client"
			}
			*into = append(*into, process.Process{PID: pid, Name: what + " " + side})
		case "tacit-node":
			*tacit = append(*tacit, process.Process{PID: pid, Name: words[1] + " " + after(words, "--node")})
		case "tacit-control":
			*tacit = append(*tacit, process.Process{PID: pid, Name: "control"})
		}
	}
	if len(*splice) != 2 || len(*tacit) != 5 || len(*copying) != 2 {
		return fmt.Errorf("found as splicing proxies %v, as Tacit %v, as copying proxies %v; want 2, 5 and 2", *splice, *tacit, *copying)
	}
	byName := func(a, b process.Process) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(*splice, byName)
	slices.SortFunc(*tacit, byName)
	return nil
}

func after(words []string, flag string) string {
	if i := slices.Index(words, flag) + 1; i > 0 && i < len(words) {
		return words[i]
	}
	return ""
}

// hold opens n connections from mesh/client, has measure look, and closes them again.
func (r *rig) hold(ctx context.Context, n int, measure func() error) error {
	words := []string{"exec", "mesh/client", "--", "load", "hold", fmt.Sprint(n)}
	for i := range holders {
		ip, err := r.podIP(ctx, fmt.Sprintf("mesh/held-%d", i))
		if err != nil {
			return err
		}
		words = append(words, ip+":"+httpPort)
	}
	stdin, stdinW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	stdoutR, stdout, err := os.Pipe()
	if err != nil {
		return errors.Join(err, stdinW.Close())
	}
	defer stdoutR.Close()
	ended := make(chan error, 1)
	go func() {
		defer stdout.Close()
		code, err := lab.Do(ctx, lab.Call{Dir: r.dir, Args: r.located(words), Stdin: stdin, Stdout: stdout, Stderr: stdout})
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d", code)
		}
		ended <- err
	}()
	said := make([]byte, 5)
	_, err = io.ReadFull(stdoutR, said)
	if err == nil && string(said) == "open\n" {
		err = measure()
	} else {
		rest, _ := io.ReadAll(stdoutR)
		err = errors.Join(err, fmt.Errorf("hold %d connections: %s%s", n, said, rest))
	}
	stdinW.Close()
	return errors.Join(err, <-ended)
}
