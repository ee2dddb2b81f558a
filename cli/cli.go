// Package cli is the verbs of tacit, the program for people: it installs the mesh on
// a cluster, looks whether all is well, and removes it without a trace; and it has
// the verbs of the lab. It stands outside of both ways: it speaks with an API server
// as the person who runs it may, and refuses to change what it was not asked to.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// Main runs the program with the words after its name, and returns its exit code.
func Main(version string, args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := rootCommand(version)
	root.SetArgs(args)
	return exitCode(root.ExecuteContext(ctx), os.Stderr)
}

// rootCommand is the program, with all of its verbs.
func rootCommand(version string) *cobra.Command {
	root := &cobra.Command{
		Use:           "tacit",
		Short:         "Mutual TLS for every pod, without changes to the pod",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(installCommand(version), upgradeCommand(version), uninstallCommand(version), checkCommand(version), statusCommand(),
		policyCommand(), flowsCommand(), strictCommand(), permissiveCommand(), nodeCommand(), imagesCommand(version), versionCommand(version), labCommand())
	return root
}

// exit is the exit code of something that has already said what was wrong.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func exitCode(err error, stderr io.Writer) int {
	var code exit
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	}
	fmt.Fprintln(stderr, "tacit:", err)
	return 1
}
