package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tacit.dev/control/kube"
	"tacit.dev/mesh"
)

func flowsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "flows [NAMESPACE[/WORKLOAD]]",
		Short: "Show between which workloads connections were",
		Long: `Shows which workloads, nodes and blocks of addresses had connections, as the nodes of enrolled pods saw them:
source, destination and port, how the connections crossed the network, how many, and when the first and last one
began or ended. A new pair appears after about 20 s; its sums follow after about a minute.

  mtls           mutual TLS
  plaintext in   an enrolled pod accepted plaintext
  plaintext out  an enrolled pod sent plaintext
  denied         the connection was reset by a policy or the mode

Connections of excluded ports, and between pods that are both not enrolled, are not seen.`,
		Example: `  tacit flows shop
  tacit flows shop/web -o json`,
		Args: cobra.MaximumNArgs(1),
	}
	t := newTarget(cmd.Flags())
	output := cmd.Flags().StringP("output", "o", "", "set the `format`: json; a table if empty")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := parseModeTarget(args)
		if err != nil {
			return err
		}
		if *output != "" && *output != "json" {
			return fmt.Errorf("output %q: want json", *output)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
		defer cancel()
		c, err := t.connect()
		if err != nil {
			return err
		}
		seen, err := kube.ReadPairs(ctx, c.client, namespace)
		if err != nil {
			return err
		}
		return showFlows(cmd.OutOrStdout(), seen, s, *output == "json")
	}
	return cmd
}

func showFlows(out io.Writer, seen kube.PairShard, s modeTarget, asJSON bool) error {
	seen.Pairs = slices.DeleteFunc(seen.Pairs, func(p mesh.Pair) bool { return !s.has(p.Source) && !s.has(p.Destination) })
	if asJSON {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(seen)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FROM\tTO\tPORT\tCROSSED\tCONNECTIONS\tBYTES\tFIRST\tLAST")
	for _, p := range seen.Pairs {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%d\t%d\t%s\t%s\n", p.Source, p.Destination, p.Port, p.Crossing, p.Connections, p.Bytes, clock(p.First), clock(p.Last))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	tellGaps(out, seen)
	return nil
}

// tellGaps says what is missing in what was observed.
func tellGaps(out io.Writer, seen kube.PairShard) {
	if seen.Other > 0 {
		fmt.Fprintf(out, "not complete: nodes had no room to record the ends of %s\n", count(seen.Other, "connection"))
	}
	if seen.Dropped > 0 {
		fmt.Fprintf(out, "not complete: control has forgotten the oldest %s\n", count(seen.Dropped, "pair"))
	}
}
