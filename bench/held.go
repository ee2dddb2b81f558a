package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"tacit.dev/bench/process"
	"tacit.dev/lab"
	"tacit.dev/pause"
)

// How many quiet connections are held: few, as many as HAProxy is compared with, and
// as many as there may be.
const (
	fewQuiet      = 1_000
	comparedQuiet = 4_000
	mostQuiet     = 10_000
)

// mostHeld is mostQuiet, or as many as the descriptors suffice for where the limit
// cannot be raised: a proxy needs two for each, and some for itself.
func mostHeld() (int, error) {
	const own = 500
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("get the limit of descriptors: %w", err)
	}
	higher := syscall.Rlimit{Cur: 1 << 20, Max: max(l.Max, 1<<20)} // as the lab does
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &higher) == nil {
		return mostQuiet, nil
	}
	return min(mostQuiet, int(min(l.Max, 1<<20)-own)/2), nil
}

// heldCounts are the numbers of connections that are held one after the other, at
// most so many.
func heldCounts(most int) []int {
	counts := []int{fewQuiet, comparedQuiet, mostQuiet}
	for i := range counts {
		counts[i] = min(counts[i], most)
	}
	return slices.Compact(counts)
}

// measureQuiet reads the memory beside more and more quiet connections, in all modes
// at the same time.
func measureQuiet(ctx context.Context, r *rig, res *result) (err error) {
	most, err := mostHeld()
	if err != nil {
		return err
	}
	var all []*held
	defer func() {
		for _, h := range all {
			err = errors.Join(err, h.end())
		}
	}()
	for _, m := range r.modes {
		if m.quietMost == 0 {
			continue
		}
		h, err := r.hold(ctx, m, heldCounts(min(m.quietMost, most)))
		if err != nil {
			return err
		}
		all = append(all, h)
	}
	for _, n := range heldCounts(most) {
		if err := measureHeld(ctx, res, all, n); err != nil {
			return err
		}
	}
	return nil
}

// measureHeld brings all to n connections, but those that hold fewer.
func measureHeld(ctx context.Context, res *result, all []*held, n int) error {
	var now []*held
	for _, h := range all {
		if i := slices.Index(h.counts, n); i >= 0 {
			now = append(now, h)
			if i > 0 {
				fmt.Fprintln(h.stdin) // that it has ended, await tells
			}
		}
	}
	for _, h := range now {
		if err := h.await(); err != nil {
			return fmt.Errorf("hold %d connections with %s between client and server: %w", n, h.mode.name, err)
		}
	}
	if !pause.For(ctx, settle) {
		return ctx.Err()
	}
	for _, h := range now {
		if err := measureMemory(res, h.mode.proxies, n); err != nil {
			return err
		}
	}
	return nil
}

func measureMemory(res *result, proxies []process.Process, connections int) error {
	for _, p := range proxies {
		bytes, err := p.RSS()
		if err != nil {
			return err
		}
		res.memory(p.Name, connections, bytes)
	}
	return nil
}

// held is a client with quiet connections in one mode. It is ended by end.
type held struct {
	mode   mode
	counts []int
	stdin  *os.File
	stdout *os.File
	said   *bufio.Reader // of stdout
	ended  chan error
}

// hold starts a client that opens as many connections as the first of counts, and the
// others one after the other when it gets a line.
func (r *rig) hold(ctx context.Context, m mode, counts []int) (*held, error) {
	var list []string
	for _, n := range counts {
		list = append(list, strconv.Itoa(n))
	}
	words := append([]string{"exec", m.load.pod, "--", "load", "hold", strings.Join(list, ",")}, m.quiet...)
	stdin, stdinW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	stdoutR, stdout, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, stdin.Close(), stdinW.Close())
	}
	h := &held{mode: m, counts: counts, stdin: stdinW, stdout: stdoutR, said: bufio.NewReader(stdoutR), ended: make(chan error, 1)}
	go func() {
		defer stdin.Close()
		defer stdout.Close()
		code, err := lab.Do(ctx, lab.Call{Dir: r.dir, Args: r.located(words), Stdin: stdin, Stdout: stdout, Stderr: stdout})
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d", code)
		}
		h.ended <- err
	}()
	return h, nil
}

// await waits until the next number of connections is open.
func (h *held) await() error {
	line, err := h.said.ReadString('\n')
	if err == nil && line == "open\n" {
		return nil
	}
	rest, _ := io.ReadAll(h.said)
	return errors.Join(err, errors.New(strings.TrimSpace(line+string(rest))))
}

// end closes all connections and waits for the client.
func (h *held) end() error {
	h.stdin.Close()
	err := <-h.ended
	h.stdout.Close()
	return err
}
