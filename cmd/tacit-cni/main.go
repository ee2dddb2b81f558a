// Command tacit-cni is the CNI plugin: the last of the chain in a node's network
// configuration,
//
//	{"type": "tacit-cni", "agent": "/run/tacit/cni.sock", "timeout": "30s"}
//
// It tells the node's agent of each pod that begins or ends; see pod/cni.
package main

import (
	"context"
	"os"

	"tacit.dev/pod/cni"
)

func main() {
	p := cni.Plugin{Env: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	os.Exit(p.Run(context.Background()))
}
