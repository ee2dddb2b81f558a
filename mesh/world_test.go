package mesh

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

var addr = netip.MustParseAddr

func TestWorldFindsByAddress(t *testing.T) {
	a := &Workload{UID: "a", Addresses: []netip.Addr{addr("10.0.0.1"), addr("fd00::1")}, Ready: true}
	s := &Service{Namespace: "d", Hostname: "s", Addresses: []netip.Addr{addr("10.1.0.1")}}
	w := NewWorld([]*Workload{a}, []*Service{s})
	for _, got := range []*Peer{w.Workload(addr("10.0.0.1")), w.Workload(addr("::ffff:10.0.0.1")), w.Workload(addr("fd00::1"))} {
		if got == nil || got.UID != a.UID {
			t.Errorf("got %v, want a", got)
		}
	}
	if w.Workload(addr("10.0.0.2")) != nil || w.Service(addr("10.0.0.1")) != nil || w.Service(addr("10.1.0.1")) != s {
		t.Error("an address led to the wrong thing")
	}
}

func TestZeroWorldIsEmpty(t *testing.T) {
	var w World
	if w.Workload(addr("10.0.0.1")) != nil || w.Service(addr("10.0.0.1")) != nil || w.Endpoints(&Service{}, 80) != nil {
		t.Error("the zero World knows something")
	}
}

func TestEndpointsAreReadyOnes(t *testing.T) {
	s := &Service{Namespace: "d", Hostname: "s"}
	serve := map[string][]Port{"d/s": {{80, 8080}, {90, 9090}}}
	up := &Workload{UID: "up", Services: serve, Ready: true}
	down := &Workload{UID: "down", Services: serve}
	got := NewWorld([]*Workload{up, down}, []*Service{s}).Endpoints(s, 90)
	if len(got) != 1 || got[0].Workload.UID != up.UID || got[0].Port != 9090 {
		t.Errorf("got %v, want up:9090 alone", got)
	}
}

func TestOneOfEach(t *testing.T) {
	list := []netip.Addr{addr("127.0.0.1"), addr("169.254.1.1"), addr("::ffff:10.0.0.1"), addr("10.0.0.2"), addr("fe80::1"), addr("fd00::1"), addr("fd00::2")}
	if got, want := OneOfEach(list), []netip.Addr{addr("10.0.0.1"), addr("fd00::1")}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestHostNetworkAddressLeadsNowhere(t *testing.T) {
	h := &Workload{Addresses: []netip.Addr{addr("10.0.0.1")}, HostNetwork: true, Ready: true}
	if NewWorld([]*Workload{h}, nil).Workload(addr("10.0.0.1")) != nil {
		t.Error("a node's address was taken for a pod")
	}
}

func TestReusedAddressBelongsToTheReadyPod(t *testing.T) {
	done := &Workload{UID: "done", Addresses: []netip.Addr{addr("10.0.0.1")}}
	live := &Workload{UID: "live", Addresses: []netip.Addr{addr("10.0.0.1")}, Ready: true}
	for _, order := range [][]*Workload{{done, live}, {live, done}} {
		if got := NewWorld(order, nil).Workload(addr("10.0.0.1")); got.UID != live.UID {
			t.Errorf("got %v, want live", got)
		}
	}
}

func TestAddressesOfPodsThatAreGoneAreFormer(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	then := time.Now()
	later := func(d time.Duration) time.Time { return then.Add(d) }
	at := func(a netip.Addr) *Workload { return &Workload{UID: a.String(), Addresses: []netip.Addr{a}} }
	both := NewWorld([]*Workload{at(a), at(b)}, nil)
	one := both.With(Changes{Gone: []string{b.String()}}, then)
	none := one.With(Changes{Gone: []string{a.String()}}, later(time.Minute))
	again := none.With(Changes{Workloads: []*Workload{at(b)}}, later(time.Minute))
	for _, row := range []struct {
		name string
		w    *World
		at   time.Time
		a, b bool
	}{
		{"both are there", both, then, false, false},
		{"one has gone", one, then, false, true},
		{"long ago", one, later(formerFor), false, false},
		{"both have gone", none, later(time.Minute), true, true},
		{"one of them longer ago", none, later(formerFor), true, false},
		{"one is another pod's", again, later(time.Minute), true, false},
	} {
		if gotA, gotB := row.w.Former(netip.AddrPortFrom(a, 80), row.at), row.w.Former(netip.AddrPortFrom(b, 80), row.at); gotA != row.a || gotB != row.b {
			t.Errorf("%s: %v, %v: want %v, %v", row.name, gotA, gotB, row.a, row.b)
		}
	}
	long := again
	for i := range 3 {
		long = long.With(Changes{}, later(time.Duration(i+2)*formerFor))
	}
	for range long.former.recent.all() {
		t.Error("kept for ever")
	}
	for range long.former.earlier.all() {
		t.Error("kept for ever")
	}
}
