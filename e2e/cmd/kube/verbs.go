package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/cluster"
)

const (
	defaultName = "tacit"
	// ready is the line by which keep tells up that the cluster is.
	ready = "ready"
)

// images is a flag that may be given several times.
type images []string

func (i *images) String() string       { return strings.Join(*i, ",") }
func (i *images) Set(tar string) error { *i = append(*i, tar); return nil }

func options(verb string, args []string) (cluster.Options, error) {
	o := cluster.Options{}
	f := flag.NewFlagSet(verb, flag.ContinueOnError)
	f.StringVar(&o.Name, "name", defaultName, "tells clusters apart")
	f.IntVar(&o.Nodes, "nodes", 2, "how many")
	f.BoolVar(&o.DualStack, "dual-stack", false, "IPv6 beside IPv4")
	f.Var((*images)(&o.Images), "image", "an OCI tar that every node has; may be repeated")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("%s: unknown argument %s", verb, f.Arg(0))
	}
	for i, tar := range o.Images {
		path, err := filepath.Abs(tar)
		if err != nil {
			return o, err
		}
		o.Images[i] = path
	}
	return o, nil
}

// up starts a keeper that owns the cluster, and returns when the cluster is ready.
func up(ctx context.Context, args []string) error {
	o, err := options("up", args)
	if err != nil {
		return err
	}
	programs, err := build.All(ctx, os.Stdout)
	if err != nil {
		return err
	}
	if err := startKeeper(ctx, filepath.Join(programs.Tools, "kube"), args); err != nil {
		return err
	}
	v, err := cluster.Find(o.Name)
	if err != nil {
		return err
	}
	fmt.Printf("\n  export KUBECONFIG=%s\n  export PATH=%s:$PATH\n  kubectl get pods -A\n\n", v.Kubeconfig(), filepath.Dir(v.KubectlPath()))
	return nil
}

// startKeeper starts the keeper in a session of its own, and shows what it says
// until it says ready.
func startKeeper(ctx context.Context, program string, args []string) error {
	cmd := exec.Command(program, append([]string{"keep"}, args...)...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })() // ^C while it starts
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if lines.Text() == ready {
			return nil
		}
		fmt.Println(lines.Text())
	}
	return errors.Join(cmd.Wait(), errors.New("the cluster did not start"))
}

// keep owns a cluster until it is told to end.
func keep(ctx context.Context, args []string) error {
	o, err := options("keep", args)
	if err != nil {
		return err
	}
	o.Progress = os.Stdout
	c, err := cluster.Up(ctx, o)
	if err != nil {
		return err
	}
	fmt.Println(ready)
	err = detach()
	if err == nil {
		<-ctx.Done()
	}
	return errors.Join(err, c.Down(context.WithoutCancel(ctx)))
}

// detach lets go of the terminal, and of the pipe to up, which ends now: to write
// there would end this process.
func detach() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	return errors.Join(unix.Dup2(int(null.Fd()), 0), unix.Dup2(int(null.Fd()), 1), unix.Dup2(int(null.Fd()), 2))
}

// named takes --name off the arguments; the rest is another program's.
func named(args []string) (string, []string) {
	switch {
	case len(args) > 1 && (args[0] == "--name" || args[0] == "-name"):
		return args[1], args[2:]
	case len(args) > 0 && strings.HasPrefix(args[0], "--name="):
		return strings.TrimPrefix(args[0], "--name="), args[1:]
	}
	return defaultName, args
}

func down(ctx context.Context, args []string) error {
	name, rest := named(args)
	if len(rest) > 0 {
		return fmt.Errorf("down: unknown argument %s", rest[0])
	}
	return cluster.End(ctx, name)
}

func status() error {
	names, err := cluster.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		v, err := cluster.Find(name)
		if err != nil {
			fmt.Printf("%s\tstarting, or ending\n", name)
			continue
		}
		machines, err := v.Machines()
		if err != nil {
			return err
		}
		fmt.Printf("%s\t%s\t%s\n", name, strings.Join(machines, " "), v.Kubeconfig())
	}
	return nil
}

func kubectl(ctx context.Context, args []string) error {
	name, rest := named(args)
	v, err := cluster.Find(name)
	if err != nil {
		return err
	}
	cmd := v.KubectlCommand(ctx, rest...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

func enter(ctx context.Context, args []string) error {
	name, rest := named(args)
	if len(rest) < 2 {
		return errors.New(usage)
	}
	v, err := cluster.Find(name)
	if err != nil {
		return err
	}
	return v.Enter(ctx, rest[0], cluster.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}, rest[1:]...)
}
