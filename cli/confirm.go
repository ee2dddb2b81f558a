package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// errDeclined: a person was asked, and did not say yes.
var errDeclined = errors.New("not confirmed: nothing was changed")

// confirm asks the person at the terminal, and returns nil if the answer is yes. Without a
// terminal nobody can be asked.
func confirm(cmd *cobra.Command, yes bool, warning string) error {
	if yes {
		return nil
	}
	in, out := cmd.InOrStdin(), cmd.ErrOrStderr()
	if !isTerminal(in) {
		return fmt.Errorf("%s\nNothing was changed: there is no terminal to ask at. Give --yes", warning)
	}
	return ask(in, out, warning)
}

func ask(in io.Reader, out io.Writer, warning string) error {
	fmt.Fprintf(out, "%s\nContinue? [y/N] ", warning)
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the answer: %w", err)
	}
	if answer := strings.ToLower(strings.TrimSpace(line)); answer != "y" && answer != "yes" {
		return errDeclined
	}
	return nil
}

func isTerminal(in io.Reader) bool {
	f, ok := in.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
