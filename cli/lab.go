package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"tacit.dev/lab"
	"tacit.dev/lab/app"
)

func labCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Run a local test cluster made of network namespaces",
		Long: `A local test cluster: nodes and pods are network namespaces of this machine, and
every process of Tacit is real. It works as root and as an ordinary user. Nothing is
left when it is down. Each verb takes --name NAME to choose among several labs.`,
	}
	cmd.AddCommand(upCommand(), downCommand())
	for _, name := range lab.Verbs() {
		cmd.AddCommand(verbCommand(name))
	}
	cmd.AddCommand(hidden("init", initLab), hidden("serve", serveLab), hidden("app", runApp), hidden("record", recordLinks))
	return cmd
}

// hidden is a role that the lab gives to this program itself.
func hidden(name string, do func(ctx context.Context, args []string) error) *cobra.Command {
	return &cobra.Command{
		Use: name, Hidden: true, DisableFlagParsing: true,
		RunE: func(c *cobra.Command, args []string) error { return do(c.Context(), args) },
	}
}

func initLab(_ context.Context, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("lab init: want a folder")
	}
	return lab.Init(args[0], args[1:])
}

func serveLab(ctx context.Context, args []string) error { return lab.Serve(ctx, args) }

func runApp(ctx context.Context, args []string) error { return app.Run(ctx, args, os.Stdout) }

func recordLinks(_ context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("lab record: want a network namespace and a file")
	}
	return lab.Record(args[0], args[1], os.Stdin, os.Stdout)
}

func upCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "up [mesh=off] [bin=FOLDER] [trust-domain=NAME] [cni-timeout=TIME] [control|agent|proxy.FLAG=VALUE]...",
		Short: "Start a lab",
		Example: `  tacit lab up
  tacit lab up --name small mesh=off
  tacit lab up control.leaf-ttl=1m proxy.dial-timeout=2s`,
		RunE: func(c *cobra.Command, args []string) error {
			program, err := os.Executable()
			if err != nil {
				return err
			}
			dir := lab.Folder(name)
			_, err = lab.Start(c.Context(), lab.StartConfig{Program: program, Dir: dir, Options: args, Stderr: os.Stderr})
			if err == nil {
				fmt.Fprintf(c.OutOrStdout(), "a lab is up; its objects and logs are in %s\n", filepath.Join(dir, "run"))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "which lab (default: default)")
	return cmd
}

func downCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop a lab, with everything in it",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return lab.Down(c.Context(), lab.Folder(name)) },
	}
	cmd.Flags().StringVar(&name, "name", "", "which lab (default: default)")
	return cmd
}

// verbCommand hands a verb to the lab, with all of its words: the lab reads them.
func verbCommand(name string) *cobra.Command {
	usage, about := lab.Usage(name)
	cmd := &cobra.Command{
		Use: name + " " + usage, Short: about, DisableFlagParsing: true,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 && (args[0] == "--help" || args[0] == "-h") {
				return c.Help()
			}
			which, args := takeName(args)
			call := lab.Call{
				Dir: lab.Folder(which), Args: append([]string{name}, args...),
				Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
			}
			code, err := lab.Do(c.Context(), call)
			if err == nil && code != 0 {
				err = exit(code)
			}
			return err
		},
	}
	cmd.Flags().String("name", "", "which lab (default: $TACIT_LAB, then default)") // for the help alone: takeName reads it
	return cmd
}

// takeName takes --name NAME out of the words before "--".
func takeName(args []string) (name string, rest []string) {
	end := len(args)
	if i := slices.Index(args, "--"); i >= 0 {
		end = i
	}
	for i, a := range args[:end] {
		if value, ok := strings.CutPrefix(a, "--name="); ok {
			return value, slices.Delete(slices.Clone(args), i, i+1)
		}
		if a == "--name" && i+1 < end {
			return args[i+1], slices.Delete(slices.Clone(args), i, i+2)
		}
	}
	return os.Getenv("TACIT_LAB"), args
}
