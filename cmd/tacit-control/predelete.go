package main

import (
	"context"
	"flag"
	"fmt"
	"time"

	"tacit.dev/control/kube"
)

// predelete succeeds when no pod is in the mesh. The chart runs it before Helm or Argo CD deletes the
// rest.
func predelete(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("tacit-control predelete", flag.ContinueOnError)
	kubeconfig := f.String("kubeconfig", "", "`file` that names the API server (default: that of the cluster this runs in)")
	limit := f.Duration("timeout", 5*time.Minute, "wait so long for pods that leave the mesh")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("predelete: %q: want flags and no arguments", f.Args())
	}
	client, err := kube.NewClient(*kubeconfig)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	return kube.AwaitEmpty(ctx, client)
}
