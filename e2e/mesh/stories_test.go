package mesh_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// TestCompatibility: for an application on n1 and one on n2 the mesh changes
// nothing: who speaks first, half-closes, resets, closed ports, TLS of its own,
// addresses, services, many connections. On the wire there is nothing of it.
func TestCompatibility(t *testing.T) {
	without, with := plain(t), enrolled(t)
	for _, s := range []space{without, with} {
		s.apply("compatibility.yaml")
	}
	without.ready("client", "server")
	with.ready("client", "server")
	with.captured("client", "server")

	for i, family := range []string{"4", "6"} {
		t.Run("IPv"+family, func(t *testing.T) {
			without, with := space{without.Mesh, t, without.name}, space{with.Mesh, t, with.name}
			before := without.Record(t)
			want := without.compatibility(i, family)
			before.Clear(greeting)
			if strings.Contains(want, "FAILED") || strings.Count(want, "\n") < 20 {
				t.Errorf("without a mesh:\n%s", want)
			}

			wire := with.Record(t)
			if got := with.compatibility(i, family); got != want {
				t.Errorf("with the mesh:\n%s\nwithout:\n%s", got, want)
			}
			wire.Hidden(greeting, "this is number")
			wire.TLS(with.addresses("client")[i], with.addresses("server")[i], compatPorts()...)
		})
	}
}

// greeting is what the lab's application says when it speaks first.
const greeting = "welcome"

// compatPorts are those of the lab's application, and the one where it does not
// listen.
func compatPorts() []int {
	ports := []int{7099}
	for p := 7000; p <= 7015; p++ {
		ports = append(ports, p)
	}
	return ports
}

// compatibility runs the checks over one family, which is the pods' i-th.
func (s space) compatibility(i int, family string) string {
	s.t.Helper()
	for _, service := range []string{"server", "own"} { // rules of a new service may come late
		address := net.JoinHostPort(s.kubectl("get", "service", service, "-o", fmt.Sprintf("jsonpath={.spec.clusterIPs[%d]}", i)), "80")
		s.eventually("the first connection to "+service, func() error {
			_, err := s.try("exec", "client", "--", "/tacit", "lab", "app", "connect", "--timeout=2s", address)
			return err
		})
	}
	return s.exec("client", "/tacit", "lab", "app", "compat", "--family="+family, "--target="+s.addresses("server")[i], "--self="+s.addresses("client")[i],
		"--service=server", "--own-service=own", "--size=8000000", "--connections=300")
}

// TestPrograms: nginx and curl, Redis, PostgreSQL with TLS of its own and without,
// each server on n2 and its client on n1.
func TestPrograms(t *testing.T) {
	without, with := plain(t), enrolled(t)
	for _, s := range []space{without, with} {
		s.apply("programs.yaml")
	}
	pods := []string{"client", "web", "cache", "db"}
	without.ready(pods...)
	with.ready(pods...)
	with.captured(pods...)

	before := without.Record(t)
	want := without.work()
	for _, secret := range secrets {
		before.Clear(secret)
	}

	wire := with.Record(t)
	if got := with.work(); got != want {
		t.Errorf("with the mesh:\n%s\nwithout:\n%s", got, want)
	}
	wire.Hidden(secrets...)
	wire.Hidden("Server: nginx", "rand_int", "pgbench_accounts")
	for pod, port := range map[string]int{"web": 80, "cache": 6379, "db": 5432} {
		wire.TLS(with.address("client"), with.address(pod), port)
	}
}

// secrets are in the answers of nginx, Redis and PostgreSQL.
var secrets = []string{"4111-1111-1111-1111", "salary of Ada", "pension of Ada"}

func (s space) work() string {
	s.t.Helper()
	for _, first := range []string{ // rules of a new service may come late
		"curl -sS --fail -o /dev/null http://web/customer.json", "redis-cli -h cache ping", "psql -h db -U app -d postgres -qAtc 'select 1'",
	} {
		s.eventually(first, func() error {
			ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
			defer cancel()
			_, err := s.Kubectl(ctx, "exec", "-n", s.name, "client", "--", "sh", "-c", first)
			return err
		})
	}
	script, err := testdata.ReadFile("testdata/work.sh")
	if err != nil {
		s.t.Fatal(err)
	}
	return s.exec("client", "sh", "-c", string(script))
}
