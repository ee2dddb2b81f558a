package install

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Every command of the README that needs a cluster is run, in the order in which it
// stands there: the blocks that are marked "sh cluster".
func TestREADME(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := clusterBlocks(string(text))
	if len(blocks) < 4 {
		t.Fatalf("README.md has %d blocks for a cluster, want install, protect, check and uninstall", len(blocks))
	}
	s := start(t)
	s.shop()
	for _, block := range blocks {
		cmd := exec.CommandContext(t.Context(), "bash", "-eux", "-o", "pipefail", "-c", block)
		cmd.Dir = t.TempDir()
		cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kubeconfig(), "REGISTRY=tacit.test", "NAMESPACE=shop",
			"PATH="+strings.Join([]string{filepath.Dir(s.TacitPath()), filepath.Dir(s.KubectlPath()), os.Getenv("PATH")}, ":"))
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Fatalf("this block of README.md: %v\n%s", err, block)
		}
	}
}

func clusterBlocks(text string) (blocks []string) {
	for _, part := range strings.Split(text, "\n```sh cluster\n")[1:] {
		block, _, _ := strings.Cut(part, "\n```")
		blocks = append(blocks, block)
	}
	return blocks
}
