// Command tacit-node is what runs on every node: the agent, which has the
// privilege and reads nothing from the network, and the proxy, which reads the
// network and has no privilege. They are two processes of one program.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

// version is set by the linker.
var version = "unknown"

const usage = `usage: tacit-node ROLE [flags]

roles:
  agent    enrolls the pods of this node; needs root
  proxy    carries their connections; needs nothing
  check    says whether this node has what the agent needs, and changes nothing
  sweep    removes what an agent has left here; none may run
  ask      asks an agent or proxy whether it is ready, or alive

tacit-node ROLE -h lists the flags of a role
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "tacit-node: %v\n", err)
		os.Exit(1)
	}
}

// run is the role that args begin with, until ctx ends.
func run(ctx context.Context, args []string) error {
	roles := map[string]func(context.Context, []string) error{
		"agent": runAgent, "proxy": runProxy, "check": runCheck, "sweep": runSweep, "ask": runAsk,
	}
	switch {
	case len(args) > 0 && roles[args[0]] != nil:
		return roles[args[0]](ctx, args[1:])
	case len(args) == 1 && slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]):
		fmt.Print(usage)
		return nil
	}
	fmt.Fprint(os.Stderr, usage)
	return fmt.Errorf("%q: want a role", args)
}
