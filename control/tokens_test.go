package control

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func testTokens(t *testing.T, files map[string]string) *TokenFolder {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tk, err := NewTokenFolder(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return tk
}

func TestTokenProvesItsNode(t *testing.T) {
	const one, two = "0123456789abcdef-one", "0123456789abcdef-two"
	tk := testTokens(t, map[string]string{
		"n1": one + "\n", "n2": two, "short": "0123456789", "empty": "", "long": strings.Repeat("x", maxToken+1),
		"twin-a": "0123456789abcdef-twin", "twin-b": "0123456789abcdef-twin", ".hidden": "0123456789abcdef-hidden",
	})
	for token, want := range map[string]string{
		one: "n1", two: "n2", "": "", "0123456789": "", one + "x": "", one[1:]: "",
		"0123456789abcdef-twin": "", "0123456789abcdef-hidden": "", strings.Repeat("x", maxToken+1): "",
	} {
		got, err := tk.Authenticate(t.Context(), token)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("token %.30q: node %q, error %v, want %q", token, got, err, want)
		}
	}
}

// A node that was just made, or whose token was replaced or taken away, is known at once.
func TestTokensFollowTheFolder(t *testing.T) {
	tk := testTokens(t, map[string]string{"n1": "0123456789abcdef-old"})
	expect := func(token, want string) {
		t.Helper()
		if got, _ := tk.Authenticate(t.Context(), token); got != want {
			t.Errorf("token %q: node %q, want %q", token, got, want)
		}
	}
	expect("0123456789abcdef-old", "n1")
	write := func(name, content string) {
		t.Helper()
		temp := filepath.Join(tk.dir, ".new")
		if err := errors.Join(os.WriteFile(temp, []byte(content), 0o600), os.Rename(temp, filepath.Join(tk.dir, name))); err != nil {
			t.Fatal(err)
		}
	}
	write("n1", "0123456789abcdef-new")
	expect("0123456789abcdef-old", "")
	expect("0123456789abcdef-new", "n1")
	write("n2", "0123456789abcdef-two")
	expect("0123456789abcdef-two", "n2")
	if err := os.Remove(filepath.Join(tk.dir, "n2")); err != nil {
		t.Fatal(err)
	}
	expect("0123456789abcdef-two", "")
}

func TestTokensNeedTheirFolder(t *testing.T) {
	if _, err := NewTokenFolder(filepath.Join(t.TempDir(), "none"), slog.New(slog.DiscardHandler)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want that it does not exist", err)
	}
}
