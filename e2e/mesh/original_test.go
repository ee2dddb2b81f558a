package mesh_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tacit.dev/e2e/build"
)

// TestOriginal: real istiod, on the API server of the cluster, makes of made-up policies what Tacit
// makes of them, but for the differences that docs/policy.md lists. compare says the seed.
func TestOriginal(t *testing.T) {
	m := cluster(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute) // the first build takes minutes
	defer cancel()
	istiod, compare, err := build.Original(ctx, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	policies := "100"
	if os.Getenv("TACIT_SOAK") != "" {
		policies = "1500"
	}
	address := startIstiod(t, istiod, m.Kubeconfig())
	out, err := exec.CommandContext(ctx, compare, "--kubeconfig", m.Kubeconfig(), "--istiod", address, "--policies", policies).CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
}

// startIstiod runs it until the test ends, and returns where it will serve xds in plaintext.
func startIstiod(t *testing.T, istiod, kubeconfig string) string {
	t.Helper()
	address := freeAddress(t)
	cmd := exec.Command(istiod, "discovery", "--kubeconfig", kubeconfig, "--grpcAddr", address, "--httpAddr", freeAddress(t),
		"--httpsAddr=", "--secureGRPCAddr=", "--monitoringAddr", freeAddress(t), "--ctrlz_port=0", "--shutdownDuration=1s")
	// It serves policies and nothing else: no certificates, no webhooks.
	cmd.Env = append(os.Environ(), "POD_NAMESPACE=istio-system", "POD_NAME=istiod", "CLUSTER_ID=Kubernetes",
		"PILOT_ENABLE_AMBIENT=true", "ENABLE_CA_SERVER=false", "PILOT_CERT_PROVIDER=none", "INJECT_ENABLED=false")
	cmd.Dir = t.TempDir()
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		ended := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		ended.Stop()
		if t.Failed() {
			lines := strings.Split(said.String(), "\n")
			t.Logf("%s: %s", filepath.Base(istiod), strings.Join(lines[max(0, len(lines)-30):], "\n"))
		}
	})
	return address
}

// freeAddress is of loopback, and nobody's at the moment.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
