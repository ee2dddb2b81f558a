package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"tacit.dev/node/agent"
	"tacit.dev/wire/finding"
)

// runCheck looks whether this node has what the agent needs.
func runCheck(ctx context.Context, args []string) error {
	cfg, report, err := parseNodeFlags("check", args)
	if err != nil {
		return err
	}
	return tell(report, agent.Examine(ctx, cfg))
}

// runSweep removes what agents have left on this node.
func runSweep(ctx context.Context, args []string) error {
	cfg, report, err := parseNodeFlags("sweep", args)
	if err != nil {
		return err
	}
	return tell(report, agent.Sweep(ctx, cfg))
}

// parseNodeFlags reads those of the agent's flags that say where things are.
func parseNodeFlags(role string, args []string) (cfg agent.Config, report string, err error) {
	s := flag.NewFlagSet("tacit-node "+role, flag.ContinueOnError)
	s.StringVar(&cfg.RunDir, "run", "/run/tacit", "`folder` of the agent")
	s.StringVar(&cfg.Proc, "proc", "/proc", "`folder` where a proc file system shows all processes of the node")
	s.StringVar(&cfg.Chain.Dir, "cni-dir", "/etc/cni/net.d", "`folder` of the node's CNI configurations")
	s.StringVar(&cfg.ProgramDir, "cni-bin-dir", "/opt/cni/bin", "`folder` of the node's CNI plugins")
	s.StringVar(&report, "report", "", "`file` for the findings as JSON, beside what is printed; the kubelet passes on "+finding.Path)
	if err := s.Parse(args); err != nil {
		return cfg, "", err
	}
	if s.NArg() > 0 {
		return cfg, "", fmt.Errorf("%s: want no arguments (%q)", role, s.Args())
	}
	return cfg, report, nil
}

// tell prints findings for people, and writes them for programs. What is lacking is
// an error.
func tell(report string, all []finding.Finding) error {
	lacking := 0
	for _, f := range all {
		if f.Lacks == "" {
			fmt.Fprintf(os.Stdout, "%s: %s\n", f.What, f.Found)
			continue
		}
		lacking++
		fmt.Fprintf(os.Stdout, "%s: LACKING: %s\n  remedy: %s\n", f.What, f.Lacks, f.Remedy)
	}
	if report != "" {
		if err := finding.Write(report, all); err != nil {
			return err
		}
	}
	if lacking > 0 {
		return fmt.Errorf("%d of %d findings are lacking", lacking, len(all))
	}
	return nil
}
