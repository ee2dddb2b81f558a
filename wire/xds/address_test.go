package xds

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/mesh"
	"tacit.dev/wire/xds/message"
)

// Istio's and Envoy's peers know fields by number only.
func TestFieldNumbers(t *testing.T) {
	for _, c := range []struct {
		message proto.Message
		name    string
		fields  string
	}{
		{&message.Workload{}, "istio.workload.Workload", `uid=20 name=1 namespace=2 addresses=3 hostname=21 network=4 tunnel_protocol=5
			trust_domain=6 service_account=7 waypoint=8 network_gateway=19 node=9 canonical_name=10 canonical_revision=11
			workload_type=12 workload_name=13 native_tunnel=14 application_tunnel=23 services=22 authorization_policies=16
			status=17 cluster_id=18 locality=24 network_mode=25 extensions=26 capacity=27`},
		{&message.Service{}, "istio.workload.Service", `name=1 namespace=2 hostname=3 addresses=4 ports=5 subject_alt_names=6 waypoint=7
			load_balancing=8 ip_families=9 extensions=10 canonical=11 ingress_use_waypoint=12`},
		{&message.Address{}, "istio.workload.Address", `workload=1 service=2`},
		{&message.Port{}, "istio.workload.Port", `service_port=1 target_port=2 app_protocol=3`},
		{&message.NetworkAddress{}, "istio.workload.NetworkAddress", `network=1 address=2 length=3`},
		{&message.GatewayAddress{}, "istio.workload.GatewayAddress", `hostname=1 address=2 hbone_mtls_port=3`},
		{&message.LoadBalancing{}, "istio.workload.LoadBalancing", `routing_preference=1 mode=2 health_policy=3`},
		{&message.Authorization{}, "istio.security.Authorization", `name=1 namespace=2 scope=3 action=4 rules=5 dry_run=6 mode=15013`},
		{&message.Rule{}, "istio.security.Rule", `clauses=1 unenforceable=15012`},
		{&message.Clause{}, "istio.security.Clause", `matches=2`},
		{&message.Match{}, "istio.security.Match", `namespaces=1 not_namespaces=2 principals=3 not_principals=4 source_ips=5 not_source_ips=6
			destination_ips=7 not_destination_ips=8 destination_ports=9 not_destination_ports=10 service_accounts=11 not_service_accounts=12`},
		{&message.StringMatch{}, "istio.security.StringMatch", `exact=1 prefix=2 suffix=3 presence=4`},
		{&message.IPRange{}, "istio.security.IPRange", `address=1 length=2`},
		{&message.ServiceAccountMatch{}, "istio.security.ServiceAccountMatch", `namespace=1 service_account=2`},
		{&message.DeltaDiscoveryRequest{}, "envoy.service.discovery.v3.DeltaDiscoveryRequest", `node=1 type_url=2 resource_names_subscribe=3
			resource_names_unsubscribe=4 initial_resource_versions=5 response_nonce=6 error_detail=7 applied_nonce=15010 held=15011`},
		{&message.DeltaDiscoveryResponse{}, "envoy.service.discovery.v3.DeltaDiscoveryResponse",
			`system_version_info=1 resources=2 type_url=4 nonce=5 removed_resources=6 origin=15010 compared=15011 digest=15012 packed=15013`},
		{&message.Resource{}, "envoy.service.discovery.v3.Resource", `version=1 resource=2 name=3`},
		{&message.Status{}, "envoy.service.discovery.v3.Status", `code=1 message=2`},
	} {
		d := c.message.ProtoReflect().Descriptor()
		if string(d.FullName()) != c.name {
			t.Errorf("%s: want %s", d.FullName(), c.name)
		}
		want := strings.Fields(c.fields)
		if d.Fields().Len() != len(want) {
			t.Errorf("%s has %d fields: want %d", c.name, d.Fields().Len(), len(want))
		}
		for _, w := range want {
			name, number, _ := strings.Cut(w, "=")
			f := d.Fields().ByName(protoreflect.Name(name))
			if f == nil || f.Number() != atoi(number) {
				t.Errorf("%s: want field %s", c.name, w)
			}
		}
	}
}

func atoi(s string) (n protoreflect.FieldNumber) {
	for _, c := range s {
		n = 10*n + protoreflect.FieldNumber(c-'0')
	}
	return n
}

func TestServiceName(t *testing.T) {
	got := message.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName
	if want := "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"; got != want {
		t.Errorf("%s: want %s", got, want)
	}
}

func TestRoundTrip(t *testing.T) {
	r := newRandomMesh(1)
	for i := range 300 {
		w := r.workload(i % 200)
		m, err := encodeWorkload(w)
		if err != nil {
			t.Fatalf("encode %+v: %v", w, err)
		}
		name, got, err := decodeAddress(m)
		if err != nil || name != w.UID {
			t.Fatalf("decode %+v: name %q, error %v", w, name, err)
		}
		if d := gocmp.Diff(any(w), got, cmpAddr, cmpPrefix); d != "" {
			t.Fatalf("workload (-want +got):\n%s", d)
		}
		s := r.service(i % 200)
		if m, err = encodeService(s); err != nil {
			t.Fatal(err)
		}
		if name, got, err = decodeAddress(m); err != nil || name != s.Key() {
			t.Fatalf("decode %+v: name %q, error %v", s, name, err)
		}
		if d := gocmp.Diff(any(s), got, cmpAddr, cmpPrefix); d != "" {
			t.Fatalf("service (-want +got):\n%s", d)
		}
		p := r.place(i % 200)
		if m, err = encodePlace(p); err != nil {
			t.Fatal(err)
		}
		if name, got, err = decodeAddress(m); err != nil || name != p.Name {
			t.Fatalf("decode %+v: name %q, error %v", p, name, err)
		}
		if d := gocmp.Diff(any(p), got, cmpAddr, cmpPrefix); d != "" {
			t.Fatalf("place (-want +got):\n%s", d)
		}
		q := r.policy(i % 200)
		got, err = decodePolicy(encodeOrFail(t, q))
		if d := gocmp.Diff(any(q), got, cmpAddr, cmpPrefix); err != nil || d != "" {
			t.Fatalf("policy, error %v (-want +got):\n%s", err, d)
		}
	}
}

var (
	cmpAddr   = gocmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	cmpPrefix = gocmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
)

// Istio leaves out what is the default.
func TestDecodeDefaults(t *testing.T) {
	w, err := decodeWorkload(&message.Workload{Uid: "u", Namespace: "ns"})
	if err != nil {
		t.Fatal(err)
	}
	want := &mesh.Workload{UID: "u", Namespace: "ns", Ready: true, OwnerKind: "deployment", Cluster: "Kubernetes",
		ID: mesh.ID{TrustDomain: "cluster.local", Namespace: "ns", ServiceAccount: "default"}}
	if d := gocmp.Diff(want, w, cmpAddr, cmpPrefix); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestDecodeRefuses(t *testing.T) {
	direct := []*message.Extension{{Name: directExtension}}
	with := func(name string, config proto.Message) []*message.Extension {
		e, err := newExtension(name, config)
		if err != nil {
			t.Fatal(err)
		}
		return []*message.Extension{e}
	}
	everything := with(placeExtension, &message.Place{Ranges: []*message.Range{{Address: make([]byte, 4)}}})
	workload := func(m *message.Workload) *message.Address {
		m.Uid, m.Namespace = or(m.Uid, "u"), or(m.Namespace, "ns")
		return &message.Address{Type: &message.Address_Workload{Workload: m}}
	}
	for name, m := range map[string]*message.Address{
		"nothing":                          {},
		"address of 5 bytes":               workload(&message.Workload{Addresses: [][]byte{make([]byte, 5)}}),
		"direct without trust domain":      workload(&message.Workload{Extensions: direct, ServiceAccount: "sa"}),
		"direct without service account":   workload(&message.Workload{Extensions: direct, TrustDomain: "lab"}),
		"place without a name":             {Type: &message.Address_Workload{Workload: &message.Workload{Extensions: with(placeExtension, &message.Place{})}}},
		"range of everything":              workload(&message.Workload{Extensions: everything}),
		"one port of nodes":                workload(&message.Workload{Extensions: with(placeExtension, &message.Place{NodePorts: []uint32{1}})}),
		"revoked nobody":                   workload(&message.Workload{Extensions: with(placeExtension, &message.Place{Trust: &message.Trust{Revoked: []string{"ns/sa"}}})}),
		"an age below 0":                   workload(&message.Workload{Extensions: with(placeExtension, &message.Place{Trust: &message.Trust{MaxAge: -1}})}),
		"an age of eons":                   workload(&message.Workload{Extensions: with(placeExtension, &message.Place{Trust: &message.Trust{MaxAge: 1 << 62}})}),
		"ports of nodes from 0":            workload(&message.Workload{Extensions: with(placeExtension, &message.Place{NodePorts: []uint32{0, 1}})}),
		"ports of nodes, the last first":   workload(&message.Workload{Extensions: with(placeExtension, &message.Place{NodePorts: []uint32{2, 1}})}),
		"port of kube-proxy too large":     {Type: &message.Address_Service{Service: &message.Service{Namespace: "ns", Hostname: "h", Extensions: with(externalExtension, &message.External{HealthPort: 65536})}}},
		"port of the host to nowhere":      workload(&message.Workload{Extensions: with(hostPortsExtension, &message.HostPorts{Ports: []*message.HostPort{{Port: 80}}})}),
		"listed, and direct":               workload(&message.Workload{TrustDomain: "lab", ServiceAccount: "sa", Extensions: append(with(listedExtension, &message.Listed{}), direct...)}),
		"another extension's config":       workload(&message.Workload{Extensions: with(placeExtension, &message.Direct{})}),
		"slash in the service account":     workload(&message.Workload{ServiceAccount: "a/sa/b"}),
		"namespace that is a path":         workload(&message.Workload{Namespace: ".."}),
		"port to nowhere":                  workload(&message.Workload{Services: map[string]*message.PortList{"k": {Ports: []*message.Port{{ServicePort: 80}}}}}),
		"port too large":                   workload(&message.Workload{Services: map[string]*message.PortList{"k": {Ports: []*message.Port{{ServicePort: 80, TargetPort: 65536}}}}}),
		"workload type of tomorrow":        workload(&message.Workload{WorkloadType: 9}),
		"service without hostname":         {Type: &message.Address_Service{Service: &message.Service{Namespace: "ns"}}},
		"service with address of no bytes": {Type: &message.Address_Service{Service: &message.Service{Namespace: "ns", Hostname: "h", Addresses: []*message.NetworkAddress{nil}}}},
	} {
		if _, v, err := decodeAddress(m); err == nil {
			t.Errorf("%s: taken as %+v", name, v)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	id := mesh.ID{TrustDomain: "lab", Namespace: "ns", ServiceAccount: "sa"}
	for name, w := range map[string]*mesh.Workload{
		"direct without identity":                {UID: "u", Namespace: "ns", Direct: true},
		"direct with another namespace's":        {UID: "u", Namespace: "other", ID: id, Direct: true},
		"address with a zone":                    {UID: "u", Namespace: "ns", ID: id, Addresses: []netip.Addr{netip.MustParseAddr("fe80::1%eth0")}},
		"no address at all, but one in the list": {UID: "u", Namespace: "ns", ID: id, Addresses: []netip.Addr{{}}},
		"owner kind":                             {UID: "u", Namespace: "ns", ID: id, OwnerKind: "statefulset"},
	} {
		if m, err := encodeWorkload(w); err == nil {
			t.Errorf("%s: encoded as %v", name, m)
		}
	}
}

func TestPodRefuses(t *testing.T) {
	good := func(change func(*message.Pod)) *message.Pod {
		m := &message.Pod{Uid: "u", Namespace: "ns", Name: "p", Identity: "spiffe://lab/ns/ns/sa/sa"}
		change(m)
		return m
	}
	if _, err := decodePod(good(func(*message.Pod) {})); err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*message.Pod{
		"uid":                     good(func(m *message.Pod) { m.Uid = "" }),
		"identity":                good(func(m *message.Pod) { m.Identity = "" }),
		"identity of another":     good(func(m *message.Pod) { m.Identity = "spiffe://lab/ns/other/sa/sa" }),
		"exclusion of everything": good(func(m *message.Pod) { m.ExcludeOutbound = []*message.Exclusion{{}} }),
		"prefix too long":         good(func(m *message.Pod) { m.ExcludeOutbound = []*message.Exclusion{{Address: make([]byte, 4), Length: 33}} }),
		"inbound port":            good(func(m *message.Pod) { m.ExcludeInbound = []uint32{65536} }),
		"probe port":              good(func(m *message.Pod) { m.ProbePorts = []uint32{0} }),
		"known address":           good(func(m *message.Pod) { m.Known = [][]byte{{10, 1}} }),
		"outbound port":           good(func(m *message.Pod) { m.ExcludeOutbound = []*message.Exclusion{{Port: 65536}} }),
	} {
		if p, err := decodePod(m); err == nil {
			t.Errorf("%s: taken as %+v", name, p)
		}
	}
}

// FuzzResource: no resource makes a node panic, and what it takes means the same
// when it is told again.
func FuzzResource(f *testing.F) {
	r := newRandomMesh(1)
	for i := range 20 {
		m, _ := encodeWorkload(r.workload(i))
		b, _ := proto.Marshal(m)
		f.Add(true, b)
		m, _ = encodeService(r.service(i))
		b, _ = proto.Marshal(m)
		f.Add(true, b)
		m, _ = encodePlace(r.place(i))
		b, _ = proto.Marshal(m)
		f.Add(true, b)
		p, _ := encodePod(r.pod(i))
		b, _ = proto.Marshal(p)
		f.Add(false, b)
	}
	f.Fuzz(func(t *testing.T, address bool, b []byte) {
		if address {
			fuzzAddress(t, b)
			return
		}
		_, p, err := unpackPod(&anypb.Any{TypeUrl: podType, Value: b})
		if err != nil {
			return
		}
		m, err := encodePod(p)
		if err != nil {
			t.Fatalf("encode %+v: %v", p, err)
		}
		again, err := decodePod(m)
		if d := gocmp.Diff(p, again, cmpAddr, cmpPrefix); err != nil || d != "" {
			t.Fatalf("error %v (-want +got):\n%s", err, d)
		}
	})
}

func fuzzAddress(t *testing.T, b []byte) {
	name, v, err := unpackAddress(&anypb.Any{TypeUrl: addressType, Value: b})
	if err != nil {
		return
	}
	new(mesh.World).With(newChanges([]any{v}, nil), time.Now())
	var m *message.Address
	switch v := v.(type) {
	case *mesh.Workload:
		m, err = encodeWorkload(v)
	case *mesh.Service:
		m, err = encodeService(v)
	case *mesh.Place:
		m, err = encodePlace(v)
	}
	if err != nil {
		t.Fatalf("encode %+v: %v", v, err)
	}
	nameAgain, again, err := decodeAddress(m)
	if d := gocmp.Diff(v, again, cmpAddr, cmpPrefix); err != nil || name != nameAgain || d != "" {
		t.Fatalf("error %v, names %q and %q (-want +got):\n%s", err, name, nameAgain, d)
	}
}
