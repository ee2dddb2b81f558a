package mesh

import (
	"reflect"
	"strings"
	"testing"
	"unsafe"
)

// A Peer is what it was made of, whether or not its UID ends with its name.
func TestPeerKeepsItsName(t *testing.T) {
	for _, w := range []*Workload{
		{UID: "Kubernetes//Pod/ns/name", Name: "name"},
		{UID: "Kubernetes//Pod/ns/other", Name: "name"},
		{Name: "name"},
		{UID: "uid"},
		{UID: strings.Repeat("n", 1<<17), Name: strings.Repeat("n", 1<<16)},
		{},
	} {
		for _, p := range []*Peer{w.Peer(), NewWorld([]*Workload{w}, nil).peerNamed(w.UID)} {
			if p.Name() != w.Name || !reflect.DeepEqual(p.Workload(), w) {
				t.Errorf("%.30q: %.30q, %+v", w.Name, p.Name(), p.Workload())
			}
		}
	}
}

func (w *World) peerNamed(uid string) *Peer {
	p, _ := w.peers.get(uid)
	return p
}

// There are as many Peers in a proxy as pods in the cluster: one word more is a megabyte.
func TestPeersAreSmall(t *testing.T) {
	if n := unsafe.Sizeof(Peer{}); n > 64 {
		t.Errorf("a Peer has %d bytes", n)
	}
}
