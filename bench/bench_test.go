package main

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseWrk(t *testing.T) {
	const said = `Running 2s test @ http://10.30.2.2:8080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    52.53us  510.03us   6.79ms   94.22%
    Req/Sec     5.40k     2.79k   12.57k    90.00%
  Latency Distribution
     50%   47.50us
     75%  279.00us
     90%  566.00us
     99%    2.80ms
  5384 requests in 1.00s, 541.55KB read
%sRequests/sec:   5382.39
Transfer/sec:    541.39KB
`
	got, err := parseWrk(strings.Replace(said, "%s", "", 1))
	if err != nil || got.requests != 5384 || got.rate != 5382.39 || got.p50 != 47.5 || got.p99 != 2800 {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{
		"unable to connect to 10.30.2.2:8080",
		strings.Replace(said, "%s", "  Socket errors: connect 0, read 3, write 0, timeout 0\n", 1),
	} {
		if got, err := parseWrk(bad); err == nil {
			t.Errorf("got %+v from %q, want an error", got, bad)
		}
	}
}

func TestParseIperf3(t *testing.T) {
	gbits, gigabytes, err := parseIperf3([]byte(`{"end":{"sum_received":{"bytes":2500000000,"bits_per_second":10e9}}}`))
	if err != nil || gbits != 10 || gigabytes != 2.5 {
		t.Errorf("got %v, %v, %v", gbits, gigabytes, err)
	}
	if _, _, err := parseIperf3([]byte(`{"error":"unable to connect"}`)); err == nil {
		t.Error("no error of a run that failed")
	}
}

func TestTakes(t *testing.T) {
	all := []mode{
		{name: "none", small: way{pod: "client"}, beside: true},
		{name: "splice", beside: true},
		{name: "tacit", small: way{pod: "other"}},
		{name: "copy", beside: true, only: bulkOnly},
	}
	for _, tt := range []struct {
		what  string
		round int
		want  string
	}{
		{"throughput_8", 0, "none splice tacit copy"},
		{"throughput_8", 1, "tacit"},
		{"rr64", 0, "none splice tacit"},
		{"rr64", 1, "tacit"},
		{"fairness", 0, "none tacit"},
		{"fairness", 1, ""},
	} {
		what := measures()[slices.Index(measureNames(), tt.what)]
		var got []string
		for _, m := range all {
			if what.takes(m, tt.round) {
				got = append(got, m.name)
			}
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s takes %v in round %d, want %s", tt.what, got, tt.round, tt.want)
		}
	}
}

// What a mode is restricted to has to be there.
func TestBulkOnly(t *testing.T) {
	for _, name := range bulkOnly {
		if !slices.Contains(measureNames(), name) {
			t.Errorf("there is no measure %s", name)
		}
	}
}

func TestCarrier(t *testing.T) {
	for words, want := range map[string]string{
		"/t/splice 127.0.0.1:1=10.0.0.1:2 127.0.0.1:3=10.0.0.1:4": "splice: splice client",
		"/t/splice --copy 10.0.0.1:2=127.0.0.1:1":                 "copy: copy server",
		"haproxy -db -f /t/client.cfg":                            "haproxy: haproxy client",
		"/t/wireguard -f wg-server":                               "wireguard: wireguard wg-server",
		"/b/tacit-node proxy --token t --node n1 --log-format x":  "tacit: proxy n1",
		"/b/tacit-control control":                                "tacit: control",
		"/t/load answer 8080":                                     ": ",
		"":                                                        ": ",
	} {
		if mode, name := carrier(strings.Fields(words)); mode+": "+name != want {
			t.Errorf("carrier of %q is %s: %s, want %s", words, mode, name, want)
		}
	}
}

func TestHeldCounts(t *testing.T) {
	for most, want := range map[int][]int{
		10_000: {1_000, 4_000, 10_000},
		9_750:  {1_000, 4_000, 9_750},
		4_000:  {1_000, 4_000},
		200:    {200},
	} {
		if diff := cmp.Diff(want, heldCounts(most)); diff != "" {
			t.Errorf("at most %d (-want +got):\n%s", most, diff)
		}
	}
}

// What HAProxy is given has to serve both sides of a mutual handshake.
func TestCertificates(t *testing.T) {
	dir := t.TempDir()
	if err := makeCertificates(dir); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "root.pem"))
	roots := x509.NewCertPool()
	if err != nil || !roots.AppendCertsFromPEM(text) {
		t.Fatalf("no root in %q: %v", text, err)
	}
	for side, name := range map[string]string{"client": "client.bench", "server": serverName} {
		path := filepath.Join(dir, side+".pem")
		pair, err := tls.LoadX509KeyPair(path, path)
		if err != nil {
			t.Fatal(err)
		}
		if pair.Leaf.PublicKeyAlgorithm != x509.ECDSA {
			t.Errorf("%s has a key of %v", side, pair.Leaf.PublicKeyAlgorithm)
		}
		usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, KeyUsages: usage}); err != nil {
			t.Errorf("%s: %v", side, err)
		}
	}
}
