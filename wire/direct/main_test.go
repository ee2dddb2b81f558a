package direct

import (
	"flag"
	"os"
	"runtime"
	"runtime/pprof"
	"testing"
	"time"
)

// TestMain fails on goroutines left over.
func TestMain(m *testing.M) {
	code := m.Run()
	// The fuzzer's own goroutines are not ours to wait for.
	fuzzing := flag.Lookup("test.fuzz").Value.String() != ""
	if code == 0 && !fuzzing && goroutinesLeft() {
		code = 1
	}
	os.Exit(code)
}

// goroutinesLeft waits, with a bound, until only the test's own goroutine is left.
func goroutinesLeft() bool {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); runtime.Gosched() {
		if runtime.NumGoroutine() <= 1 {
			return false
		}
	}
	_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
	return true
}
