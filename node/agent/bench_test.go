package agent

import (
	"testing"

	"tacit.dev/mesh"
	"tacit.dev/wire/handle"
)

// BenchmarkSockets measures the way of a batch of sockets, from the proxy's need
// until it has them.
func BenchmarkSockets(b *testing.B) {
	n := startNode(b, b.TempDir(), func(c *Config) { c.Log = nil })
	p := dialProxy(b, n.dir, nil)
	_, path := namespace(b, "a")
	n.agent.Apply([]mesh.Pod{word("a", true)})
	if err := n.ask(addOf("a", path)); err != nil {
		b.Fatal(err)
	}
	want := 0
	for b.Loop() {
		want += handle.MaxFiles
		if err := p.conn.Send(handle.Message{Kind: handle.Need, UID: "a", Family: 4, Count: handle.MaxFiles}); err != nil {
			b.Fatal(err)
		}
		p.until(b, "a batch", func() bool { return p.sockets["a"] == want })
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(want), "µs/socket")
}
