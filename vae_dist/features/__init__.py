"""Networks with published weights, whose features say how alike images look: LPIPS, and the Inception of FID."""
