package main

import "testing"

func TestExplain(t *testing.T) {
	for arg, want := range map[string]int{"--help": 0, "-h": 0, "help": 0, "add": 1} {
		if got := explain([]string{arg}); got != want {
			t.Errorf("tacit-cni %s: exit code %d, want %d", arg, got, want)
		}
	}
}
