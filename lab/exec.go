package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// podCommand is a command as it runs in a pod. The first word "app" stands for
// the test application.
func (c *Cluster) podCommand(p *pod, userName string, words []string) *exec.Cmd {
	cmd := c.command(words)
	cmd.Env = append(cmd.Env, "POD_NAME="+p.name, "POD_NAMESPACE="+p.namespace,
		"POD_IP="+p.address.v4.String(), "POD_IP6="+p.address.v6.String(), "NODE_NAME="+p.node.name)
	if userName != "" {
		c.as(cmd, userName)
	}
	return cmd
}

func (c *Cluster) command(words []string) *exec.Cmd {
	if words[0] == "app" {
		words = append([]string{c.program, "lab", "app"}, words[1:]...)
	}
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Dir = "/"
	cmd.Env = os.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	return cmd
}

// as has cmd run as another user, since servers such as PostgreSQL refuse to be
// root. In the lab of an ordinary user that other user is the same one under
// another number, in a user namespace of its own.
func (c *Cluster) as(cmd *exec.Cmd, name string) {
	uid, gid := 1000, 1000
	if u, err := user.Lookup(name); err == nil {
		uid, _ = strconv.Atoi(u.Uid)
		gid, _ = strconv.Atoi(u.Gid)
	}
	if c.rootful() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		return
	}
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: 0, Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: 0, Size: 1}}
}

// place is where a command can run: a pod, "node/NAME", or "underlay".
type place struct {
	pod  *pod
	node *node
}

func (c *Cluster) place(name string) (place, error) {
	if name == bridgeName {
		return place{}, nil
	}
	if rest, ok := strings.CutPrefix(name, "node/"); ok {
		n, err := c.node(rest)
		return place{node: n}, err
	}
	p, err := c.pod(name)
	return place{pod: p}, err
}

func (c *Cluster) node(name string) (*node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.nodes[name]; n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("there is no node %s", name)
}

// prepareCommand makes a command and the way to start it at that place.
func (c *Cluster) prepareCommand(at place, user, dir string, words []string) (*exec.Cmd, func() error) {
	if user != "" {
		dir = "/" // the asker's folder may be closed to that user
	}
	if at.pod != nil {
		cmd := c.podCommand(at.pod, user, words)
		cmd.Dir = dir
		return cmd, func() error { return at.pod.enter(cmd) }
	}
	cmd := c.command(words)
	cmd.Dir = dir
	if at.node != nil {
		return cmd, func() error { return at.node.ns.Do(cmd.Start) }
	}
	return cmd, cmd.Start
}

// exec runs a command to its end and returns its exit code. The end of ctx kills
// it.
func (c *Cluster) exec(ctx context.Context, call verbCall, at place, user string, words []string) error {
	cmd, start := c.prepareCommand(at, user, call.dir, words)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = call.stdin, call.stdout, call.stderr
	j, err := c.startJob("exec "+words[0], cmd, start)
	if err != nil {
		return err
	}
	select {
	case <-j.done:
	case <-ctx.Done():
		_ = j.signal(syscall.SIGKILL) // nobody is there any more to be told
		<-j.done
	}
	if code := j.code(); code != 0 {
		return exitError(code)
	}
	return nil
}

// exitError is the exit code of a command that said itself what was wrong.
type exitError int

func (e exitError) Error() string { return "exit code " + strconv.Itoa(int(e)) }

// begin starts a named job in the background; its words go to its log.
func (c *Cluster) begin(name string, at place, user, dir string, words []string) error {
	c.mu.Lock()
	_, taken := c.jobs[name]
	c.mu.Unlock()
	if taken || strings.Contains(name, "/") {
		return fmt.Errorf("job %q: there is one already, or the name has a slash", name)
	}
	out, err := os.OpenFile(c.logPath("job."+name), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd, start := c.prepareCommand(at, user, dir, words)
	cmd.Stdout, cmd.Stderr = out, out
	j, err := c.startJob(name, cmd, start)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.jobs[name] = j
	return nil
}

// finish ends a job (with a signal, or waits if there is none), prints its words
// and returns its exit code. It waits no longer than within.
func (c *Cluster) finish(ctx context.Context, call verbCall, name string, s syscall.Signal, within time.Duration) error {
	c.mu.Lock()
	j := c.jobs[name]
	c.mu.Unlock()
	if j == nil {
		return fmt.Errorf("there is no job %s", name)
	}
	if s != 0 {
		if err := j.signal(s); err != nil {
			return err
		}
	}
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-j.done:
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("job %s goes on after %s; it said: %s", name, within, c.said(name))
	}
	c.mu.Lock()
	delete(c.jobs, name)
	c.mu.Unlock()
	fmt.Fprint(call.stdout, c.said(name))
	if code := j.code(); code != 0 {
		return exitError(code)
	}
	return nil
}

// jobPatience is how long a job may take to end by itself or after its signal, if
// nothing else is said.
const jobPatience = 3 * time.Minute

func (c *Cluster) said(job string) string {
	text, err := os.ReadFile(filepath.Clean(c.logPath("job." + job)))
	if err != nil {
		return err.Error()
	}
	return string(text)
}
