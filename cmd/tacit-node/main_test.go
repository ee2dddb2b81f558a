package main

import (
	"errors"
	"flag"
	"testing"
)

func TestHelpIsNoError(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"-h"}, {"help"}, {"agent", "--help"}} {
		if err := run(t.Context(), args); err != nil && !errors.Is(err, flag.ErrHelp) { // main takes that for none
			t.Errorf("tacit-node %q: %v", args, err)
		}
	}
	for _, args := range [][]string{nil, {"nothing"}, {"--help", "agent"}} {
		if err := run(t.Context(), args); err == nil {
			t.Errorf("tacit-node %q: no error", args)
		}
	}
}
