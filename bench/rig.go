package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tacit.dev/lab"
)

// Ports of the servers.
const (
	iperfPort = "5201"
	httpPort  = "8080"
)

// holders is how many pods take the held connections.
const holders = 4

// rig is a running lab, with the same two servers on either side:
//
//	node n1                               node n2
//	plain/client ── (splice, haproxy…) ── (splice, haproxy…) ── plain/server
//	mesh/client ─── tacit ─────────────── tacit ─────────────── mesh/server
//	mesh/other ──── tacit ─────────────── tacit ─────────────── mesh/held-0…
type rig struct {
	dir   string
	lab   *lab.Started
	tools string // folder of splice, load and wireguard, and of what the proxies are told
	modes []mode
	notes []string // what the result has to say besides
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
		"pod n1/plain/client", "pod n2/plain/server", "pod n1/mesh/client", "pod n2/mesh/server", "pod n1/mesh/other",
		"wait protected mesh/client mesh/server mesh/other",
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
// command; what the run has built is found without its folder.
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
	if i := slices.Index(words, "--") + 1; i > 0 && slices.Contains([]string{"splice", "load", "wireguard"}, words[i]) {
		words[i] = filepath.Join(r.tools, words[i])
	}
	return words
}

func (r *rig) podIP(ctx context.Context, pod string) (string, error) {
	ip, err := r.output(ctx, "exec", pod, "--", "printenv", "POD_IP")
	return strings.TrimSpace(ip), err
}
