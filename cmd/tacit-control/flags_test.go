package main

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	tokens := t.TempDir()
	if err := errors.Join(os.Mkdir(tokens+"/proxies", 0o700), os.Mkdir(tokens+"/agents", 0o700)); err != nil {
		t.Fatal(err)
	}
	cfg, _, err := parse([]string{"--source", t.TempDir(), "--state", t.TempDir(), "--tokens", tokens, "--listen", "[::1]:1", "--name", "a,b", "--name", "c",
		"--trust-domain", "lab", "--node-ports", "20000-22767", "--cluster-cidr", "10.30.0.0/16", "--cluster-cidr", "fd00:30::/48", "--leaf-ttl", "5s", "--gone-after", "3s", "--log-format", "text", "--log-level", "debug"})
	if err != nil {
		t.Fatal(err)
	}
	if err := cfg.Validate(); err != nil {
		t.Error(err)
	}
	if got := strings.Join(cfg.Names, " "); got != "a b c" || cfg.LeafTTL != 5*time.Second || cfg.GoneAfter != 3*time.Second || cfg.TrustDomain != "lab" || len(cfg.Ranges) != 2 || !cfg.NodePorts.Has(20000) || cfg.NodePorts.Has(30000) {
		t.Errorf("names %q, leaf ttl %v, gone after %v, trust domain %q", got, cfg.LeafTTL, cfg.GoneAfter, cfg.TrustDomain)
	}
}

func TestParseRefuses(t *testing.T) {
	for text, args := range map[string]string{
		"--source":       "",
		"no arguments":   "--source . more",
		"--tokens":       "--source .",
		"NAMESPACE/NAME": "--source kubernetes --node-account x",
		"two that":       "--source kubernetes --proxy-audience a --agent-audience a",
		"--log-format":   "--source . --log-format loud",
		"--log-level":    "--source . --log-level loud",
		"1 to 10000":     "--source kubernetes --status-writes 0",
		"8 bits":         "--source . --cluster-cidr 0.0.0.0/0",
		"no '/'":         "--source . --cluster-cidr 10.0.0.1",
		"FIRST-LAST":     "--source . --node-ports 32767-30000",
		"1 to 65535":     "--source . --node-ports 0-70000",
		"not defined":    "--sauce .",
	} {
		if _, _, err := parse(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: error %v, want %q", args, err, text)
		}
	}
}
