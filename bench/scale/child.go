package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"tacit.dev/bench/process"
)

// child is a process of this program in another role. It ends with its standard input, and so
// with this process.
type child struct {
	process process.Process
	stdin   io.WriteCloser
	stdout  io.ReadCloser // of the nodes; others write their log to it
	ended   chan error
}

// farewell is how long a child may take to end.
const farewell = 10 * time.Second

func startChild(r *rig, name string, args ...string) (*child, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(r.dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stderr = log
	c := &child{ended: make(chan error, 1)}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if cmd.Stdout = log; args[0] == "fleet" {
		cmd.Stdout = nil
		if c.stdout, err = cmd.StdoutPipe(); err != nil {
			return nil, err
		}
	}
	if err := r.place.start(cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	c.process, c.stdin = process.Process{PID: cmd.Process.Pid, Name: name}, stdin
	go c.wait(cmd) // stop receives
	return c, nil
}

func (c *child) wait(cmd *exec.Cmd) { c.ended <- cmd.Wait() }

func (c *child) kill(context.Context) error {
	p, err := os.FindProcess(c.process.PID)
	if err == nil {
		err = p.Kill()
	}
	return err
}

// stop ends the child, and waits for it. That it was killed before is no error.
func (c *child) stop() error {
	c.stdin.Close()
	if c.stdout != nil {
		defer c.stdout.Close()
	}
	select {
	case err := <-c.ended:
		var exit *exec.ExitError
		if errors.As(err, &exit) && !exit.Exited() {
			return nil
		}
		return err
	case <-time.After(farewell):
	}
	err := c.kill(context.Background())
	<-c.ended
	return errors.Join(fmt.Errorf("%s did not end within %v", c.process.Name, farewell), err)
}

// tail is the end of the logs, for when something went wrong.
func (r *rig) tail() error {
	logs, err := filepath.Glob(filepath.Join(r.dir, "*.log"))
	errs := []error{err}
	if l, ok := r.place.(*laboratory); ok {
		more, err := filepath.Glob(filepath.Join(l.dir, "run", "logs", "*.log"))
		logs, errs = append(logs, more...), append(errs, err)
	}
	for _, path := range logs {
		text, err := os.ReadFile(path)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		last := strings.Join(lines[max(0, len(lines)-5):], "\n\t")
		if errs = append(errs, err); last != "" {
			errs = append(errs, fmt.Errorf("%s:\n\t%.3000s", filepath.Base(path), last))
		}
	}
	return errors.Join(errs...)
}
