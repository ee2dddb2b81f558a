package control

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tacit.dev/mesh"
)

// testTokens makes files of folders proxies and agents.
func testTokens(t *testing.T, files map[string]string) (tk *Tokens, dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "proxies"), 0o700), os.Mkdir(filepath.Join(dir, "agents"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tk, err := OpenTokens(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return tk, dir
}

func TestTokenProvesItsProcess(t *testing.T) {
	const one, two, agent = "0123456789abcdef-one", "0123456789abcdef-two", "0123456789abcdef-agent"
	const twin, shared, hidden = "0123456789abcdef-twin", "0123456789abcdef-shared", "0123456789abcdef-hidden"
	tk, _ := testTokens(t, map[string]string{
		"proxies/n1": one + "\n", "proxies/n2": two, "agents/n1": agent,
		"proxies/short": "0123456789", "proxies/empty": "", "agents/long": strings.Repeat("x", maxToken+1),
		"proxies/twin-a": twin, "proxies/twin-b": twin, "proxies/n3": shared, "agents/n3": shared, "agents/.hidden": hidden,
	})
	var nobody mesh.Process
	for token, want := range map[string]mesh.Process{
		one: {Node: "n1"}, two: {Node: "n2"}, agent: {Node: "n1", Agent: true},
		"": nobody, "0123456789": nobody, one + "x": nobody, one[1:]: nobody,
		twin: nobody, shared: nobody, hidden: nobody, strings.Repeat("x", maxToken+1): nobody,
	} {
		got, err := tk.Authenticate(t.Context(), token)
		if got != want || (err == nil) != (want != nobody) {
			t.Errorf("token %.30q: %+v, error %v, want %+v", token, got, err, want)
		}
	}
}

// A node that was just made, or whose token was replaced or taken away, is known at once.
func TestTokensFollowTheirFolders(t *testing.T) {
	tk, dir := testTokens(t, map[string]string{"agents/n1": "0123456789abcdef-old"})
	expect := func(token, want string) {
		t.Helper()
		if got, _ := tk.Authenticate(t.Context(), token); got.Node != want {
			t.Errorf("token %q: node %q, want %q", token, got.Node, want)
		}
	}
	expect("0123456789abcdef-old", "n1")
	write := func(name, content string) {
		t.Helper()
		temp := filepath.Join(dir, "agents", ".new")
		if err := errors.Join(os.WriteFile(temp, []byte(content), 0o600), os.Rename(temp, filepath.Join(dir, "agents", name))); err != nil {
			t.Fatal(err)
		}
	}
	write("n1", "0123456789abcdef-new")
	expect("0123456789abcdef-old", "")
	expect("0123456789abcdef-new", "n1")
	write("n2", "0123456789abcdef-two")
	expect("0123456789abcdef-two", "n2")
	if err := os.Remove(filepath.Join(dir, "agents", "n2")); err != nil {
		t.Fatal(err)
	}
	expect("0123456789abcdef-two", "")
}

func TestTokensNeedTheirFolders(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "proxies"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenTokens(dir, nil); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "agents") {
		t.Errorf("error %v, want that agents does not exist", err)
	}
}
