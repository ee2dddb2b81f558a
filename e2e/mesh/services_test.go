package mesh_test

import (
	"fmt"
	"testing"
)

// reached is what a client on n1 finds behind services of every kind. n2 is in another
// zone.
const reached = `named ports: one two 
affinity: 1 server
policy Local: one 
policy Local, nobody there: no answer
same node: one 
same zone: one 
nobody in the zone: two 
not ready: no answer
not ready, but published: never 
headless: two 
external name: one two 
`

// TestServices: the mesh takes over from kube-proxy which endpoint a connection goes
// to, and decides as it does.
func TestServices(t *testing.T) {
	without, with := plain(t), enrolled(t)
	script, err := testdata.ReadFile("testdata/services.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []space{without, with} {
		s.apply("services.yaml", "NAMESPACE", s.name)
		s.ready("one", "two", "client")
	}
	with.captured("one", "two", "client")
	wire := with.Record(t)
	for _, s := range []space{without, with} {
		s.eventually("services of namespace "+s.name, func() error { // rules of a new service may come late
			got, err := s.try("exec", "client", "--", "sh", "-c", string(script))
			if err == nil && got != reached {
				err = fmt.Errorf("got:\n%swant:\n%s", got, reached)
			}
			return err
		})
	}
	wire.Clear("this is two") // by kube-proxy
	wire.TLS(with.address("client"), with.address("two"), 9090)
}
