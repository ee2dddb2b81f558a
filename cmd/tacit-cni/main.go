// Command tacit-cni is the CNI plugin: the last of the chain in a node's network
// configuration,
//
//	{"type": "tacit-cni", "agent": "/run/tacit/cni.sock", "timeout": "30s"}
//
// It tells the node's agent of each pod that begins or ends; see pod/cni.
package main

import (
	"context"
	"fmt"
	"os"
	"slices"

	"tacit.dev/pod/cni"
)

const usage = `tacit-cni is a CNI plugin (https://www.cni.dev): a container runtime runs it, with CNI_COMMAND in the
environment and a network configuration at standard input. The agent of tacit-node puts it in its place.
`

func main() {
	if len(os.Args) > 1 {
		os.Exit(explain(os.Args[1:]))
	}
	p := cni.Plugin{Env: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	os.Exit(p.Run(context.Background()))
}

// explain answers a person: runtimes give no arguments.
func explain(args []string) int {
	if len(args) == 1 && slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
		fmt.Print(usage)
		return 0
	}
	fmt.Fprintf(os.Stderr, "%stacit-cni: %q: want no arguments\n", usage, args)
	return 1
}
