package app

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
)

// Run is the program: its words are serve, connect, compat, load, many, dial, hostile, chatter, conntrack, bulk.
// It returns when the work is done, or ctx ended.
func Run(ctx context.Context, words []string, stdout io.Writer) error {
	commands := map[string]func(context.Context, []string, io.Writer) error{
		"serve": serve, "connect": connect, "compat": compat, "load": load, "many": many, "dial": dialOnly,
		"hostile": hostile, "chatter": chatter, "conntrack": conntrack, "bulk": bulk,
	}
	if len(words) == 0 || commands[words[0]] == nil {
		return fmt.Errorf("app: want one of serve, connect, compat, load, many, dial, hostile, chatter, conntrack, bulk; got %q", strings.Join(words, " "))
	}
	err := commands[words[0]](ctx, words[1:], stdout)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	return err
}
