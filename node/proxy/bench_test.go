package proxy

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// BenchmarkConnection is a whole connection through two proxies: dial, a
// question, its echo, the end. Both proxies, the client and the server are in this process.
func BenchmarkConnection(b *testing.B) {
	c := newCluster(b)
	client, server := c.pod("client"), c.pod("server")
	stranger := c.pod("stranger")
	n1, n2 := c.node(quietLog), c.node(quietLog)
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, echo)
	stranger.serve(1, echo)
	for _, row := range []struct {
		name string
		to   *testPod
	}{{"mutual TLS", server}, {"pass through", stranger}} {
		b.Run(row.name, func(b *testing.B) {
			b.ReportAllocs()
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if err := askOnce(client, row.to.at(false, 1)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

func quietLog(cfg *Config) { cfg.Log = nil }

// BenchmarkQuiet tells what a quiet connection costs each proxy.
func BenchmarkQuiet(b *testing.B) {
	c := newCluster(b)
	client, server := c.pod("client"), c.pod("server")
	n1, n2 := c.node(quietLog), c.node(quietLog)
	n1.enroll(client)
	n2.enroll(server)
	server.serve(1, echo)
	const many = 1000
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		var open []*net.TCPConn
		for range many {
			conn, err := client.dial(server.at(false, 1))
			if err != nil {
				b.Fatal(err)
			}
			say(b, conn, "hello")
			open = append(open, conn)
		}
		fmt.Fprintln(os.Stderr, "goroutines", runtime.NumGoroutine())
		runtime.ReadMemStats(&after)
		report(b, "new-", &before, &after, many)
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&after)
		report(b, "gc-", &before, &after, many)
		for _, conn := range open {
			conn.Close()
		}
		await(b, "all are closed", func() bool { return n1.count("tacit_connections_open") == 0 })
	}
}

func report(b *testing.B, when string, before, after *runtime.MemStats, n float64) {
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, when+"heap-B/conn")
	b.ReportMetric(float64(int64(after.StackInuse)-int64(before.StackInuse))/n, when+"stack-B/conn")
	b.ReportMetric(float64(int64(after.Sys)-int64(before.Sys))/n, when+"sys-B/conn")
}
