// Command kube starts Kubernetes clusters on this machine for people, and is the
// first process of each of their nodes.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"tacit.dev/e2e/build"
	"tacit.dev/e2e/cluster"
	"tacit.dev/e2e/machine"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	var ended *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &ended) && ended.Exited():
		os.Exit(ended.ExitCode()) // of kubectl, or of a command on a node: it has complained itself
	default:
		fmt.Fprintln(os.Stderr, "kube:", err)
		os.Exit(1)
	}
}

const usage = `usage:
  kube up [--name N] [--nodes 2] [--dual-stack] [--image TAR]...
  kube down [--name N]
  kube status
  kube kubectl [--name N] ARGUMENTS...
  kube enter [--name N] NODE COMMAND...
  kube build`

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	verb, args := args[0], args[1:]
	switch verb {
	case "up":
		return up(ctx, args)
	case "keep":
		return keep(ctx, args)
	case "down":
		return down(ctx, args)
	case "status":
		return status()
	case "kubectl":
		return kubectl(ctx, args)
	case "enter":
		return enter(ctx, args)
	case "build": // what the others do first, for those whose output is not seen
		_, err := build.All(ctx, os.Stdout)
		return err
	}
	return inside(ctx, verb, args)
}

// inside are the words that package cluster says to its own processes.
func inside(ctx context.Context, verb string, args []string) error {
	switch {
	case verb == cluster.WordWait:
		return machine.Wait(cluster.WordInit)
	case verb == cluster.WordInit:
		return machine.Init(cluster.WordServe)
	case verb == cluster.WordServe && len(args) == 1:
		return machine.Serve(ctx, args[0])
	case verb == cluster.WordJanitor && len(args) == 1:
		signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP) // it ends when it has cleaned up
		return cluster.Janitor(context.WithoutCancel(ctx), os.Stdin, args[0])
	}
	return fmt.Errorf("no verb %s\n%s", verb, usage)
}
