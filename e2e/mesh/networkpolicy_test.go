package mesh_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// rulesOfNode are what a CNI makes of the NetworkPolicy of networkpolicy.yaml, in the namespace of
// the server's node: its pod gets one port from one client, and nothing else that is forwarded.
// %[1]s is a family of nft, %[2]s the client, %[3]s the server, %[4]d the port.
const rulesOfNode = `
table ip%[1]s network_policy {
	chain forward {
		type filter hook forward priority 0; policy accept;
		ct state established,related accept
		ip%[1]s daddr != %[3]s accept
		ip%[1]s saddr %[2]s tcp dport %[4]d counter accept
		counter drop
	}
}
`

// TestNetworkPolicy: a NetworkPolicy that others enforce on the node keeps its meaning, since a
// connection under mutual TLS has the pods' own addresses, and the port that was dialed. The port
// that it does not allow stays closed, and so does everything for who is not named.
func TestNetworkPolicy(t *testing.T) {
	without, with := plain(t), enrolled(t)
	for _, s := range []space{without, with} {
		s.apply("networkpolicy.yaml")
	}
	pods := []string{"friend", "stranger", "server"}
	without.ready(pods...)
	with.ready(pods...)
	with.captured(pods...)
	for _, s := range []space{without, with} {
		name := map[bool]string{true: "in the mesh", false: "without"}[s.name == with.name]
		t.Run(name, func(t *testing.T) {
			s := space{s.Mesh, t, s.name}
			friends, servers := s.addresses("friend"), s.addresses("server")
			for i, family := range []string{"", "6"} {
				s.allowOnePort(family, friends[i], servers[i], s.name == with.name)
			}
		})
	}
}

const allowedPort, forbiddenPort = 7001, 7011

func (s space) allowOnePort(family, friend, server string, mesh bool) {
	s.t.Helper()
	at := server
	if family != "" {
		at = "[" + server + "]"
	}
	connect := func(pod string, port int) error {
		_, err := s.try("exec", pod, "--", "/tacit", "lab", "app", "connect", "--timeout=2s", "--say=open sesame", fmt.Sprintf("%s:%d", at, port))
		return err
	}
	for _, port := range []int{allowedPort, forbiddenPort} {
		s.eventually("both ports are open without the rules", func() error { return errors.Join(connect("friend", port), connect("stranger", port)) })
	}
	s.filter(fmt.Sprintf(rulesOfNode, family, friend, server, allowedPort))
	defer s.filter("delete table ip" + family + " network_policy")
	wire := s.Record(s.t)
	// Rules that are new end nothing that is connected, and Tacit keeps connections for ten seconds.
	s.eventually("what is not allowed is closed", func() error {
		if connect("friend", forbiddenPort) == nil || connect("stranger", allowedPort) == nil {
			return errors.New("it is open")
		}
		return nil
	})
	if err := connect("friend", allowedPort); err != nil {
		s.t.Errorf("the allowed port: %v", err)
	}
	if connect("friend", forbiddenPort) == nil {
		s.t.Error("the forbidden port is open again")
	}
	if rules, err := s.Run(s.t.Context(), "n2", "nft", "list", "table", "ip"+family, "network_policy"); err != nil || strings.Contains(rules, "packets 0 ") {
		s.t.Errorf("not every rule has seen a packet: %s, %v", rules, err)
	}
	if mesh {
		wire.Hidden("open sesame")
	} else {
		wire.Clear("open sesame")
	}
}

// filter has the server's node load rules.
func (s space) filter(rules string) {
	s.t.Helper()
	if out, err := s.Run(s.t.Context(), "n2", "nft", rules); err != nil {
		s.t.Fatalf("%s: %v: %s", rules, err, out)
	}
}
