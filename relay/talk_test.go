package relay

import (
	"context"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"
)

// runUnhurried is runLoops that look for quiet passages so seldom that no test sees it.
func runUnhurried(t testing.TB) *Loops {
	l := NewLoops(1)
	l.tick = time.Hour
	runThem(t, l)
	return l
}

// rests reports whether p is at rest, dozing or not.
func (p *Passage) rests() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mode == resting
}

// talk has both applications speak in turn.
func talk(t *testing.T, r *rig, times int) {
	t.Helper()
	for range times {
		say(t, r.a, "question")
		hear(t, r.b, "question")
		say(t, r.b, "answer")
		hear(t, r.a, "answer")
	}
}

// Who talks without a pause, little at a time, is at rest soon.
func TestTalkerRests(t *testing.T) {
	l := runUnhurried(t)
	for kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			r, p := startIn(t, l, kind)
			talk(t, r, 1)
			if p.rests() {
				t.Fatal("at rest after one question")
			}
			for end := time.Now().Add(10 * time.Second); !p.rests(); {
				if time.Now().After(end) {
					t.Fatal("not at rest after ten seconds of talk")
				}
				talk(t, r, 1)
			}
			talk(t, r, 100)
			if !p.rests() {
				t.Error("a small message had it rise")
			}
			r.a.Close()
			hearEnd(t, r.b)
			r.b.Close()
			r.ends(Finished)
		})
	}
}

// Who says much now and then rests the less often, so that it does not come and go all the time;
// and soon again, once it has talked for long.
func TestPatienceGrows(t *testing.T) {
	one := &Passage{patience: patienceFirst}
	for range 20 {
		one.steps = 3
		one.learn()
	}
	if one.patience != patienceMost {
		t.Errorf("patience %d after 20 rests of 3 steps, want %d", one.patience, patienceMost)
	}
	one.steps = patienceMost + 1
	if one.learn(); one.patience != patienceFirst {
		t.Errorf("patience %d after a long rest, want %d", one.patience, patienceFirst)
	}
	r, p := startIn(t, runUnhurried(t), "tcp to other")
	defer func() { r.a.Close(); r.b.Close(); r.ends(Finished) }()
	const much = 1 << 20
	for range 3 {
		for end := time.Now().Add(10 * time.Second); !p.rests(); talk(t, r, 1) {
			if time.Now().After(end) {
				t.Fatal("not at rest after ten seconds of talk")
			}
		}
		rested := p.patienceNow()
		var wait sync.WaitGroup
		wait.Go(func() { r.a.Write(make([]byte, much)) })
		if n, err := io.CopyN(io.Discard, r.b, much); n != much || err != nil {
			t.Fatalf("%d bytes, %v", n, err)
		}
		wait.Wait()
		if now := p.patienceNow(); now != 2*rested {
			t.Errorf("patience %d after a short rest, want %d", now, 2*rested)
		}
	}
}

func (p *Passage) patienceNow() int32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.patience
}

// While the loop's own goroutine does not get to run, one that has carried much does what has come
// for those at rest.
func TestBulkHelps(t *testing.T) {
	l := NewLoops(1)
	one := l.all[0]
	f, _, err := one.begin()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer one.close()
	quiet, p := startIn(t, l, "tcp to other")
	for end := time.Now().Add(10 * time.Second); !p.rests(); p.rest() {
		if time.Now().After(end) {
			t.Fatal("not at rest after ten seconds")
		}
		runtime.Gosched()
	}
	say(t, quiet.a, "question")
	bulk, _ := startIn(t, l, "tcp to other")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if _, err := bulk.a.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	}()
	go io.Copy(io.Discard, bulk.b)
	hear(t, quiet.b, "question")
	cancel()
	for _, r := range []*rig{quiet, bulk} {
		r.cancel()
		<-r.result
	}
}
