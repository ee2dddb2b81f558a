package cli

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write the generated part of docs/reference/cli.md anew")

// TestReferenceIsTheCommands compares docs/reference/cli.md with the commands. With -update it
// writes that.
func TestReferenceIsTheCommands(t *testing.T) {
	const page = "../docs/reference/cli.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	describe(&b, rootCommand("VERSION"))
	part := regexp.MustCompile(`(?s)(<!-- generated: tacit -->\n).*(<!-- end -->)`)
	now := part.ReplaceAllStringFunc(string(text), func(string) string {
		return "<!-- generated: tacit -->\n\n" + b.String() + "<!-- end -->"
	})
	switch {
	case !part.Match(text):
		t.Fatalf("%s has no part <!-- generated: tacit -->", page)
	case now == string(text):
	case *update:
		if err := os.WriteFile(page, []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s is not what the commands say. Run: make reference", filepath.Base(page))
	}
}

// describe writes what a person reads about a command and those below it, but for the hidden
// ones. The verbs of the lab have no flags: they are a table.
func describe(b *strings.Builder, cmd *cobra.Command) {
	if cmd.Runnable() {
		about := cmd.Long
		if about == "" {
			about = strings.ToUpper(cmd.Short[:1]) + cmd.Short[1:] + "."
		}
		fmt.Fprintf(b, "## %s\n\n```text\n%s\n```\n\n", cmd.CommandPath(), strings.TrimSuffix(cmd.UseLine(), " [flags]"))
		fmt.Fprintf(b, "```text\n%s\n```\n\n", about)
		if cmd.Example != "" {
			fmt.Fprintf(b, "Examples:\n\n```text\n%s\n```\n\n", cmd.Example)
		}
		describeFlags(b, cmd)
	}
	var verbs []*cobra.Command
	for _, c := range cmd.Commands() {
		switch {
		case c.Hidden:
		case c.DisableFlagParsing:
			verbs = append(verbs, c)
		default:
			describe(b, c)
		}
	}
	if len(verbs) == 0 {
		return
	}
	fmt.Fprintf(b, "## %s\n\n```text\n%s\n```\n\n| verb | meaning |\n|---|---|\n", cmd.CommandPath(), cmd.Long)
	for _, c := range verbs {
		fmt.Fprintf(b, "| `%s` | %s |\n", inCell(strings.TrimSpace(c.Use)), inCell(c.Short))
	}
	b.WriteString("\n")
}

func describeFlags(b *strings.Builder, cmd *cobra.Command) {
	var rows strings.Builder
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		if value != "" {
			name += " " + strings.ToUpper(value)
		}
		byDefault := ""
		if f.DefValue != "" && f.DefValue != "[]" && f.DefValue != "false" {
			byDefault = "`" + f.DefValue + "`"
		}
		fmt.Fprintf(&rows, "| `%s` | %s | %s |\n", inCell(name), byDefault, inCell(usage))
	})
	if rows.Len() > 0 {
		fmt.Fprintf(b, "| flag | default | meaning |\n|---|---|---|\n%s\n", rows.String())
	}
}

func inCell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

// TestDocumentedCommands: each line of a page's code that begins with tacit is a command that
// there is, with flags that it has.
func TestDocumentedCommands(t *testing.T) {
	checked := 0
	for _, glob := range []string{"../*.md", "../docs/*.md", "../docs/*/*.md"} {
		pages, err := filepath.Glob(glob)
		if err != nil {
			t.Fatal(err)
		}
		for _, page := range pages {
			for _, words := range commandsOf(t, page) {
				checked++
				if err := understood(words); err != nil {
					t.Errorf("%s: tacit %s: %v", page, strings.Join(words, " "), err)
				}
			}
		}
	}
	if checked < 10 {
		t.Errorf("%d commands were checked, want at least 10", checked)
	}
}

var (
	shellBlock = regexp.MustCompile("(?ms)^ *```(?:sh|sh cluster|console)$(.*?)^ *```$")
	shellEnd   = regexp.MustCompile(` +[|>#&].*`) // a pipe, a redirection, a comment
)

// commandsOf are the calls of tacit that a page shows, without the name of the program.
func commandsOf(t *testing.T, page string) (commands [][]string) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range shellBlock.FindAllStringSubmatch(string(text), -1) {
		for line := range strings.SplitSeq(strings.ReplaceAll(block[1], "\\\n", " "), "\n") {
			words := strings.Fields(shellEnd.ReplaceAllString(line, ""))
			if len(words) > 0 && filepath.Base(words[0]) == "tacit" {
				commands = append(commands, words[1:])
			}
		}
	}
	return commands
}

// understood reports why words are no command with its flags and arguments.
func understood(words []string) error {
	cmd, rest, err := rootCommand("VERSION").Find(words)
	if err != nil {
		return err
	}
	if !cmd.Runnable() {
		return fmt.Errorf("%s wants a verb", cmd.CommandPath())
	}
	if cmd.DisableFlagParsing {
		return nil
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}
