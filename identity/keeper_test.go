package identity

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// run starts a Keeper; the bubble of the test ends only if all of it has.
func run(t *testing.T, ca *testCA) *Keeper {
	k := NewKeeper(KeeperConfig{Signer: ca})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return k
}

func TestKeeperRenewsAtHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		k := run(t, ca)
		defer k.Hold(id("a"))()
		must(t, k.Ready(t.Context(), id("a")))
		first, err := k.Leaf(id("a"))
		must(t, err)
		time.Sleep(25 * time.Minute)
		if now, _ := k.Leaf(id("a")); now != first {
			t.Error("renewed before half of its life")
		}
		time.Sleep(10 * time.Minute)
		if now, _ := k.Leaf(id("a")); now == first {
			t.Error("not renewed after half of its life")
		}
		if n := ca.called(); n != 2 {
			t.Errorf("asked %d times", n)
		}
	})
}

func TestKeeperOutlivesItsSigner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		k := run(t, ca)
		defer k.Hold(id("a"))()
		must(t, k.Ready(t.Context(), id("a")))
		ca.set(errors.New("no route to control"))
		time.Sleep(59 * time.Minute)
		if _, err := k.Leaf(id("a")); err != nil {
			t.Errorf("a valid leaf was dropped: %v", err)
		}
		time.Sleep(2 * time.Minute)
		_, err := k.Leaf(id("a"))
		if Reason(err) != ReasonExpired || !strings.Contains(err.Error(), "no route to control") {
			t.Errorf("after its end: %v is %s", err, Reason(err))
		}
		before := ca.called()
		if before < 20 || before > 200 {
			t.Errorf("asked %d times in half an hour", before)
		}
		ca.set(nil)
		must(t, k.Ready(t.Context(), id("a"))) // comes back by itself
		if _, err := k.Leaf(id("a")); err != nil {
			t.Error(err)
		}
	})
}

// Each wait is twice the last one, up to a bound, plus or minus half of it.
func TestKeeperBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		ca.set(errors.New("no route to control"))
		k := run(t, ca)
		defer k.Hold(id("a"))()
		want := firstRetry
		for range 12 {
			synctest.Wait()
			wait := time.Until(k.Dump()[0].NextTry)
			if wait < want/2 || wait >= want/2+want {
				t.Errorf("try %d: the next one is in %v, want about %v", ca.called(), wait, want)
			}
			time.Sleep(wait)
			want = min(2*want, lastRetry)
		}
		synctest.Wait()
		if n := ca.called(); n != 13 {
			t.Errorf("asked %d times", n)
		}
	})
}

func TestKeeperReadyTellsWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		ca.set(errors.New("no such pod on this node"))
		k := run(t, ca)
		defer k.Hold(id("a"))()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := k.Ready(ctx, id("a"))
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no such pod") {
			t.Errorf("%v", err)
		}
		if _, err := k.Leaf(id("a")); Reason(err) != ReasonNoCertificate {
			t.Errorf("%v is %s", err, Reason(err))
		}
		if err := k.Ready(t.Context(), id("b")); !errors.Is(err, ErrNotHeld) {
			t.Errorf("%v", err)
		}
		if d := k.Dump(); len(d) != 1 || d[0].LastError == "" || d[0].Identity != id("a").String() {
			t.Errorf("%+v", d)
		}
	})
}

func TestKeeperCountsHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		k := run(t, ca)
		one, two := k.Hold(id("a")), k.Hold(id("a"))
		must(t, k.Ready(t.Context(), id("a")))
		one()
		one()
		if _, err := k.Leaf(id("a")); err != nil {
			t.Errorf("still held once: %v", err)
		}
		two()
		if _, err := k.Leaf(id("a")); !errors.Is(err, ErrNotHeld) {
			t.Errorf("released: %v", err)
		}
		asked := ca.called()
		time.Sleep(24 * time.Hour)
		if ca.called() != asked {
			t.Error("renewed for nobody")
		}
		defer k.Hold(id("a"))()
		must(t, k.Ready(t.Context(), id("a")))
	})
}

func TestKeeperManyIdentities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		k := NewKeeper(KeeperConfig{Signer: ca})
		names := strings.Split("abcdefghijklmnopqrstuvwxyz", "")
		for _, n := range names { // before Run
			defer k.Hold(id(n))()
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		for _, n := range names {
			must(t, k.Ready(t.Context(), id(n)))
		}
		// Issued at one moment, they are not renewed at one.
		synctest.Wait()
		renewals := map[time.Time]bool{}
		for _, s := range k.Dump() {
			renewals[s.NextTry] = true
		}
		if len(renewals) != len(names) {
			t.Errorf("%d identities are renewed at %d moments", len(names), len(renewals))
		}
		cancel()
		must(t, <-done)
	})
}
