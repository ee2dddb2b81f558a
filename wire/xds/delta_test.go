package xds

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"tacit.dev/wire/xds/message"
)

// follower is a delta without a stream: it tells what it applies and answers, and when.
type follower struct {
	*delta[string]
	responses chan *message.DeltaDiscoveryResponse
	answers   chan answer
	told      []string
	since     time.Time
}

func startFollower(t *testing.T) *follower {
	f := &follower{responses: make(chan *message.DeltaDiscoveryResponse), answers: make(chan answer, 1000), since: time.Now()}
	f.delta = newDelta[string](ClientConfig{}, namespaceType)
	f.decode = func(a *anypb.Any) (string, string, error) { return string(a.GetValue()), string(a.GetValue()), nil }
	f.apply = func(changed, gone []string) <-chan struct{} {
		f.told = append(f.told, fmt.Sprintf("%v: %v and without %v", time.Since(f.since), changed, gone))
		return nil
	}
	go f.follow(t.Context(), f.responses, f.answers, func() {})
	return f
}

func (f *follower) bring(version, nonce, name string) {
	r := &message.DeltaDiscoveryResponse{Nonce: nonce, SystemVersionInfo: version}
	if name[0] == '-' {
		r.RemovedResources = []string{name[1:]}
	} else {
		r.Resources = []*message.Resource{{Name: name, Version: nonce, Resource: &anypb.Any{Value: []byte(name)}}}
	}
	f.responses <- r
}

// answered gives the nonces that were answered since it was last called.
func (f *follower) answered() (nonces []string) {
	synctest.Wait()
	for len(f.answers) > 0 {
		nonces = append(nonces, (<-f.answers).nonce)
	}
	return nonces
}

// What comes alone is applied at once; what comes fast is applied together, within 20 ms,
// in order, and answered only then.
func TestFastChangesAreAppliedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFollower(t)
		f.bring("1", "n1", "a")
		if got := f.answered(); !slices.Equal(got, []string{"n1"}) {
			t.Errorf("answered %v: want the first at once", got)
		}
		for i := range 3 {
			time.Sleep(5 * time.Millisecond)
			f.bring("2", fmt.Sprint("m", i), []string{"b", "-a", "c"}[i])
		}
		if got := f.answered(); len(got) > 0 {
			t.Errorf("answered %v: want none that is not applied", got)
		}
		time.Sleep(5 * time.Millisecond)
		if got := f.answered(); !slices.Equal(got, []string{"m0", "m1", "m2"}) {
			t.Errorf("answered %v: want all three, in order", got)
		}
		time.Sleep(time.Second)
		f.bring("3", "l1", "d")
		synctest.Wait()
		f.bring("4", "l2", "e")
		f.bring("5+", "l3", "f") // the first part of what is applied when it is complete
		synctest.Wait()
		f.bring("5", "l4", "g")
		close(f.responses) // what is complete is applied even if the stream ends
		if got := f.answered(); !slices.Equal(got, []string{"l1", "l2", "l3", "l4"}) {
			t.Errorf("answered %v: want all, in order", got)
		}
		want := []string{
			"0s: [a] and without []", "20ms: [b c] and without [a]",
			"1.02s: [d] and without []", "1.02s: [e] and without []", "1.02s: [f g] and without []",
		}
		if !slices.Equal(f.told, want) {
			t.Errorf("applied\n%q: want\n%q", f.told, want)
		}
	})
}

// A publication of which a part has come when the stream ends waits for the rest.
func TestPartOfAPublicationIsNotApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFollower(t)
		f.bring("1+", "n1", "a")
		close(f.responses)
		if got := f.answered(); !slices.Equal(got, []string{"n1"}) || len(f.told) > 0 {
			t.Errorf("answered %v and applied %v: want an answer, and nothing applied", got, f.told)
		}
	})
}

// Not even a flood of changes waits longer, or is answered without a bound.
func TestAFloodIsAppliedEvery20ms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := startFollower(t)
		for i := range 1000 {
			f.bring(fmt.Sprint(i), fmt.Sprint(i), "a")
			time.Sleep(time.Millisecond)
		}
		close(f.responses)
		if got := f.answered(); len(got) != 1000 || !slices.IsSortedFunc(got, func(a, b string) int { return len(a) - len(b) }) {
			t.Errorf("%d answers, in order: want 1000", len(got))
		}
		if n := len(f.told); n < 49 || n > 52 {
			t.Errorf("applied %d times in a second: want about 50", n)
		}
	})
}
